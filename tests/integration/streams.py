"""A client of streamed answers without sockets, which reads exactly as slowly as a test requires."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Message

UNREAD = 1
"""Messages that may be unread before the sender has to wait."""


@dataclass(frozen=True)
class SentEvent:
    """One event or comment, parsed from its frame."""

    name: str | None
    data: Any
    number: str | None
    comment: str | None = None


class StreamClient:
    """A client that requests a stream and takes its events one by one; events not taken stay with the service."""

    def __init__(self, app: Any, body: dict[str, Any], path: str = "/v1/generate") -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._unread: asyncio.Queue[Message] = asyncio.Queue(UNREAD)
        self._asked = False
        self._gone = asyncio.Event()
        self._content = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("192.0.2.1", 1234),
            "server": ("localhost", 80),
        }
        self.answering = asyncio.ensure_future(app(scope, self._receive, self._send))

    def go_away(self) -> None:
        """Close the connection."""
        self._gone.set()

    async def take(self) -> SentEvent | None:
        """Return the next event; None after the last."""
        while True:
            message = await self._unread.get()
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            elif message.get("body"):
                return _parsed(message["body"])
            else:
                await self.answering
                return None

    async def rest(self) -> list[SentEvent]:
        """Return all remaining events."""
        events = []
        while (event := await self.take()) is not None:
            events.append(event)
        return events

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._gone.is_set():
            await self._unread.put(message)


@asynccontextmanager
async def streaming(app: Any, **body: Any) -> AsyncIterator[StreamClient]:
    """Request a stream; disconnect the client at the end."""
    client = StreamClient(app, {"stream": True, **body})
    try:
        yield client
    finally:
        client.go_away()
        client.answering.cancel()
        await asyncio.gather(client.answering, return_exceptions=True)


def _parsed(framed: bytes) -> SentEvent:
    text = framed.decode()
    assert text.endswith("\n\n")
    fields = dict(line.split(": ", 1) for line in text.strip().splitlines() if not line.startswith(":"))
    comment = text[1:].strip() if text.startswith(":") else None
    data = json.loads(fields["data"]) if "data" in fields else None
    return SentEvent(fields.get("event"), data, fields.get("id"), comment)
