"""Bytes of a stream are parsed into events, however they are split."""

from __future__ import annotations

import json
from itertools import pairwise

from fastapi.sse import format_sse_event
from hypothesis import given
from hypothesis import strategies as st

from cli.server_sent_events import EventDecoder, ServerSentEvent


def decoded(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@given(
    sent=st.lists(st.tuples(st.sampled_from(["queued", "progress"]), st.text(max_size=5)), max_size=4),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    ending=st.sampled_from([b"\n", b"\r\n"]),
)
def test_splits_at_any_byte_and_any_characters_in_json_change_nothing(
    sent: list[tuple[str, str]], cuts: list[int], ending: bytes
) -> None:
    events = [(name, json.dumps(text + "\u2028é", ensure_ascii=False)) for name, text in sent]
    framed = b"".join(format_sse_event(event=name, data_str=data, id="1") for name, data in events)
    framed = framed.replace(b"\n", ending)
    places = [0, *sorted(min(cut, len(framed)) for cut in cuts), len(framed)]
    chunks = [framed[begin:end] for begin, end in pairwise(places)]
    assert decoded(*chunks) == [ServerSentEvent(name, data) for name, data in events]


def test_comments_and_unknown_fields_are_ignored_and_data_lines_are_joined() -> None:
    stream = b": keep-alive\n\nretry: 3\nevent: a\ndata: 1\ndata:2\n\nevent: forgotten\n\ndata: 3\n\n"
    assert decoded(stream) == [ServerSentEvent("a", "1\n2"), ServerSentEvent("", "3")]


def test_an_incomplete_event_at_the_end_is_ignored() -> None:
    assert decoded(b"event: completed\ndata: {}\n") == []
