"""Decode Server-Sent Events (WHATWG HTML, section 9.2), as far as this service uses them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One event: its name and its data."""

    name: str
    data: str


class EventDecoder:
    """Decode a stream given in chunks of any size; an incomplete event at the end of the stream is ignored.

    Lines end in LF or CR LF only. httpx's `iter_lines` also splits at characters such as U+2028, which JSON may
    contain. The fields `id` and `retry` are ignored, because the client does not reconnect.
    """

    def __init__(self) -> None:
        self._unfinished = bytearray()
        self._name = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that are complete with this chunk."""
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
        field, _, value = line.partition(":")  # the field of a comment is empty
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
