"""The JSON of request bodies."""

from __future__ import annotations

import pytest

from service.errors import MalformedJson
from service.http.door.json_body import read_json

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
