"""From the bytes of a stream to Server-Sent Events (WHATWG HTML, section 9.2), as far as this service sends them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One event: its name and its data."""

    name: str
    data: str


class EventDecoder:
    """Takes bytes however they were cut, gives the events that are whole; an event cut off by the end is none.

    Lines end in LF or CR LF and in nothing else: httpx's `iter_lines` also ends them at characters such as U+2028,
    which JSON may hold. Of the fields, `id` and `retry` are passed over, because nobody reconnects.
    """

    def __init__(self) -> None:
        self._unfinished = bytearray()
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that end in these bytes."""
        *ends, rest = chunk.split(b"\n")
        events = []
        for end in ends:
            self._unfinished += end
            line = self._unfinished.removesuffix(b"\r").decode(errors="replace")
            self._unfinished.clear()
            if line:
                self._take(line)
            elif self._data:
                events.append(ServerSentEvent(self._name, "\n".join(self._data)))
            if not line:
                self._name, self._data = "", []
        self._unfinished += rest
        return events

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")  # of a comment, the field is empty
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
