"""HTTP/1.1 connections with time limits that uvicorn does not have, and with answers for half-closed connections."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import cast

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.http.door.connection_limit import OpenConnections
from service.http.door.context import NO_PLACE, context_of, ended_as
from service.http.door.security_headers import SECURITY_HEADERS
from service.http.faults import Fault, answer_of
from service.http.routes import FALLBACK_INTERFACE, interface_of

READ_BYTES = 64 << 10
"""Most bytes of a read, which are parsed at once: in chunks of one byte, asyncio's 256 KiB would stop the event loop
for 0.2 s."""

INCOMPLETE = (h11.IDLE, h11.SEND_BODY)
"""States of a client whose request has not arrived completely."""


FIRST_CHECK_S = 0.1
"""Seconds from a client's half-close to the first check whether it is still connected."""
CHECK_INTERVAL_S = 1.0


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections of slow clients, and idle ones if new connections need their place.

    Reading: a request must arrive completely within `read_seconds` of the connection or, on a reused connection, of its
    first byte. Writing: a client must read some of its answer every `write_seconds`.

    A client may close its sending side and read its answer (`nc -N`). A client that has closed both sides looks the
    same until something is sent to it. So "100 Continue" is sent, which clients ignore; if the client is gone, its
    system answers with a reset, which ends the request.
    """

    read_seconds = 10.0
    write_seconds = 60.0
    open_connections: OpenConnections

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _half_closed = False
    _half_closed_check: asyncio.TimerHandle | None = None
    _was_sent_100 = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # of asyncio's transports for sockets
        transport.set_write_buffer_limits(high=0)  # pause_writing is called as soon as anything is buffered
        if not self.open_connections.enter(self):
            self.app_state = {**self.app_state, NO_PLACE: True}
        self._time_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_reading()
        self.open_connections.mark(self, idle=not self._in_flight)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may have begun with a request that was sent before this answer
        self._time_reading()
        self.open_connections.mark(self, idle=not self._in_flight)
        if self._half_closed and not self.transport.is_closing():
            self._go_on_half_closed()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.open_connections.leave(self)
        for timer in (self._reading, self._writing, self._half_closed_check):
            if timer is not None:
                timer.cancel()

    def make_room(self) -> None:
        """Close the connection, which is idle, at once: another one needs its place."""
        self.transport.abort()

    @property
    def _in_flight(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _should_upgrade(self) -> bool:
        """Ignore Upgrade (h2c, with every request of Java's HttpClient), as servers may: uvicorn would warn twice."""
        return False

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's lets the connection close
        """Keep the connection until its request is answered: the client may still read."""
        self._half_closed = True
        self._go_on_half_closed()
        return True

    def _go_on_half_closed(self) -> None:
        incomplete = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if self._in_flight and self.conn.their_state is not h11.SEND_BODY:
            if self._half_closed_check is None:
                self._half_closed_check = self.loop.call_later(FIRST_CHECK_S, self._check_half_closed, FIRST_CHECK_S)
        elif incomplete and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(HTTPStatus.BAD_REQUEST, "the connection was closed before the whole request had arrived")
        else:
            self.transport.close()

    def _check_half_closed(self, waited: float) -> None:
        """Abort the request if the client has closed both sides."""
        self._half_closed_check = None
        if not self._in_flight:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()  # the client's system answered with a reset
            return
        if self.conn.our_state is h11.SEND_RESPONSE and not self._was_sent_100:
            if self.conn.their_http_version != b"1.0":
                self._was_sent_100 = True
                head = h11.InformationalResponse(status_code=HTTPStatus.CONTINUE, reason=b"Continue", headers=[])
                self.transport.write(self.conn.send(head) or b"")
            elif waited == CHECK_INTERVAL_S:  # no "100 Continue" in HTTP/1.0, and only images take so long
                self.transport.abort()
                return
        wait = min(2 * waited, CHECK_INTERVAL_S)
        self._half_closed_check = self.loop.call_later(wait, self._check_half_closed, wait)

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
            self.transport.close()  # no request was begun

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _watch_writing(self, left: int) -> None:
        self._writing = self.loop.call_later(self.write_seconds, self._check_writing, left)

    def _check_writing(self, left_before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < left_before:
            self._watch_writing(left)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP with an error in the usual form."""
        self._answer(HTTPStatus.BAD_REQUEST, "this could not be read as an HTTP request, or its head is too long")

    def _answer(self, status: HTTPStatus, detail: str) -> None:
        """Answer without the app, unless it has begun to answer; then close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        interface, more = FALLBACK_INTERFACE, dict(SECURITY_HEADERS)
        if self.cycle is not None and not self.cycle.response_complete:  # an app waits for the body of this request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            scope = cast("Scope", self.cycle.scope)  # uvicorn's type is narrower
            ended_as(scope, status)
            interface = interface_of(scope)
            if request_id := context_of(scope).request_id:
                more["X-Request-ID"] = request_id
        answer = answer_of(Fault(status=status, title=status.phrase.capitalize(), detail=detail), interface)
        described = {name.title(): value for name, value in answer.headers.items()}
        headers = [*described.items(), *more.items(), ("Connection", "close")]
        head = h11.Response(status_code=status, reason=status.phrase.encode(), headers=headers)
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def limited_protocol(
    read_seconds: float, write_seconds: float, open_connections: OpenConnections
) -> type[LimitedProtocol]:
    """Return the protocol with these limits as a class, which uvicorn takes."""
    limits = {"read_seconds": read_seconds, "write_seconds": write_seconds, "open_connections": open_connections}
    return type("LimitedProtocol", (LimitedProtocol,), limits)
