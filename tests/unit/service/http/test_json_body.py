"""The JSON of request bodies."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator

import pytest

from service.errors import MalformedJson
from service.http.door.json_body import read_json
from service.http.encoding_pool import LARGE_BODY
from tests.waiting import runs

BOM = b"\xef\xbb\xbf"


def test_one_byte_order_mark_is_ignored() -> None:
    assert read_json(BOM + b'{"steps": 2}') == {"steps": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOM + BOM + b"{}", "more than one byte order mark"),
        (BOM, "Expecting value, in line 1, column 1"),
        ("{}".encode("utf-16"), "not UTF-8"),
    ],
)
def test_invalid_json_is_refused_with_a_clear_message(text: bytes, message: str) -> None:
    with pytest.raises(MalformedJson, match=message):
        read_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1.5, "b": [null, true, {"c": "\\u00e9\\n", "c": 2}], "a": -2}',
        "[NaN, Infinity, 1e999, 12345678901234567890123]",
        '{"a" 1}',
        '{"a": 1,}',
        "[1,\n 2,\n 3 4]",
        '{"a": tru}',
        "{a: 1}",
        '"\\x"',
        '"a\nb"',
        "{} {}",
        "",
        "[1, 2",
        '{"a',
        "[" * 50_000,
        "1" + "0" * 5000,
    ],
)
def test_a_large_text_has_the_value_or_the_error_of_a_small_one(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome() -> str:
        try:
            return repr(read_json(text.encode()))
        except MalformedJson as error:
            return str(error)

    as_small = outcome()
    monkeypatch.setattr("service.http.door.json_body.LARGE_BODY", 0)
    assert outcome() == as_small


@pytest.fixture
def short_turns() -> Iterator[None]:
    """Let threads take turns more often, so that a short text is enough."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("short_turns")
@runs
async def test_the_event_loop_goes_on_while_a_thread_reads_a_large_text() -> None:
    text = json.dumps([1.5] * 100_000).encode()
    assert len(text) > LARGE_BODY
    reading = asyncio.create_task(asyncio.to_thread(read_json, text))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(reading.result()) == 100_000
    assert turns > 2000  # tens of thousands; a few hundred with the C scanner, which no other thread interrupts
