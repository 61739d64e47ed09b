"""EventSource: an answer of Server-Sent Events with keep-alives, which ends at once when its client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi.sse import format_sse_event
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.http.client_gone import disconnected
from service.http.door.context import ended_as
from service.http.door.observe import CLIENT_CLOSED

KEEP_ALIVE_S = 15.0
"""Seconds without an event after which a comment is sent: proxies close connections that are silent for a minute."""
MEDIA_TYPE = "text/event-stream"
_KEEP_ALIVE = format_sse_event(comment="keep-alive")


class EventSource(Response):
    """Sends the framed events that a generator yields.

    When the client disconnects the generator is closed, so that it frees its rows. Not a StreamingResponse, which
    leaves closing to the garbage collector.
    """

    media_type = MEDIA_TYPE

    def __init__(self, events: AsyncGenerator[bytes], on_end: Callable[[], None]) -> None:
        """Prepare the answer.

        Args:
            events: yields framed events.
            on_end: called when the answer has ended, even if the generator never started.
        """
        self.status_code = 200
        self.background = None
        # No cache may store it, and no proxy may buffer it
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events
        self._on_end = on_end
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        sending = asyncio.ensure_future(self._send_events(send))
        tasks = [sending, asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self._keep_alive(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._on_end()
        if sending.cancelled():
            ended_as(scope, CLIENT_CLOSED)
        else:
            sending.result()

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": b""})

    async def _keep_alive(self, send: Send) -> None:
        self._sent_at = time.monotonic()
        while True:
            silent = time.monotonic() - self._sent_at
            if silent >= KEEP_ALIVE_S:
                await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})
                self._sent_at = time.monotonic()
            else:
                await asyncio.sleep(KEEP_ALIVE_S - silent)
