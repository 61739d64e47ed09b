"""A connection with time limits: uvicorn's has none for a client that sends too slowly, or does not read its answer."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import cast

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api.faults import MEDIA_TYPE
from service.api.observe import ended_as
from service.api.problems import problem
from service.api.security_headers import SECURITY_HEADERS

INCOMPLETE = (h11.IDLE, h11.SEND_BODY)
"""States of a client whose request has not arrived, or not all of it."""


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that ends connections of slow clients.

    Reading: a request must be here, to the last byte of its body, within `read_seconds` of the connection or, on one
    that is used again, of its first byte. Writing: a client must take some of its answer every `write_seconds`.
    """

    read_seconds = 10.0
    write_seconds = 60.0

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # tells us when anything at all is left to be written
        self._time_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may have begun with a request that was sent before this answer
        self._time_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def _time_reading(self) -> None:
        # Between two requests uvicorn has a limit of its own.
        idle = self.timeout_keep_alive_task is not None and not self.conn.trailing_data[0]
        if self.conn.their_state not in INCOMPLETE:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None
        elif self._reading is None and not idle and not self.transport.is_closing():
            self._reading = self.loop.call_later(self.read_seconds, self._read_too_slowly)

    def _read_too_slowly(self) -> None:
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._answer(HTTPStatus.REQUEST_TIMEOUT, f"the request did not arrive within {self.read_seconds:g} s")
        else:
            self.transport.close()  # nothing was asked

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _watch_writing(self, left: int) -> None:
        self._writing = self.loop.call_later(self.write_seconds, self._look_at_writing, left)

    def _look_at_writing(self, left_before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < left_before:
            self._watch_writing(left)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered."""
        self._answer(HTTPStatus.BAD_REQUEST, "this could not be read as an HTTP request, or its head is too long")

    def _answer(self, status: HTTPStatus, detail: str) -> None:
        """Answer without the app, unless that has begun to; then close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = bytes(problem(status, status.phrase.capitalize(), detail).body)
        headers = {"Content-Type": MEDIA_TYPE, **SECURITY_HEADERS, "Content-Length": str(len(body))}
        if self.cycle is not None and not self.cycle.response_complete:  # an app waits for the body of this request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            scope = cast("Scope", self.cycle.scope)  # uvicorn's type is narrower
            ended_as(scope, status)
            if request_id := scope["state"].get("request_id"):
                headers["X-Request-ID"] = request_id
        head = h11.Response(
            status_code=status, reason=status.phrase.encode(), headers=[*headers.items(), ("Connection", "close")]
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def timed_protocol(read_seconds: float, write_seconds: float) -> type[TimedProtocol]:
    """Return the protocol with these limits, as uvicorn wants it: a class."""
    return type("TimedProtocol", (TimedProtocol,), {"read_seconds": read_seconds, "write_seconds": write_seconds})
