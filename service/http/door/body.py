"""Read the whole body, up to a limit, before a request is handled. A pure ASGI middleware."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.problems import problem


class WholeBody:
    """Passes on requests whose body is complete. One that is too long gets 413; one that breaks off gets no answer.

    Bodies longer than `max_bytes`, of requests that may have given images, together take at most `max_large_bytes`
    until their requests are answered; another one gets 503 when it has arrived, and is not kept until then.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        given_bytes: Callable[[Scope], int] = lambda _: 0,
        max_large_bytes: int = 0,
    ) -> None:
        """Create the middleware.

        Args:
            app: what it passes requests on to.
            max_bytes: most bytes of any body.
            given_bytes: returns how many more a request may have.
            max_large_bytes: most bytes of all longer bodies in memory.
        """
        self._app = app
        self._max_bytes = max_bytes
        self._given_bytes = given_bytes
        self._max_large_bytes = max_large_bytes
        self._large_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._max_bytes + min(self._given_bytes(scope), self._max_large_bytes)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            await _too_long(most, Connection="close")(scope, receive, send)  # before any of it is read
            return
        held = length = 0
        body = bytearray()
        refused = False
        more = True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                part = message.get("body", b"")
                length += len(part)
                more = message.get("more_body", False)
                if length > most:
                    await _too_long(most)(scope, receive, send)
                    return
                if refused:
                    continue
                body += part
                taken = length - held if length > self._max_bytes else 0
                if taken and self._large_bytes + taken > self._max_large_bytes:
                    # The rest is read and dropped: clients that are cut off while they send get no answer
                    refused = True
                    self._large_bytes -= held
                    held = 0
                    body = bytearray()
                    continue
                held += taken
                self._large_bytes += taken
            if refused:
                await _too_many()(scope, receive, send)
                return
            whole = bytes(body)
            del body
            await self._app(scope, once(whole, receive), send)
        finally:
            self._large_bytes -= held


def _too_long(most: int, **headers: str) -> Response:
    return problem(413, "Body too large", f"the body must be at most {most} bytes", headers=headers)


def _too_many() -> Response:
    text = "the given images of other requests take all memory for them"
    return problem(503, "Queue full", text, headers={"Retry-After": "1"})


def once(body: bytes, then: Receive) -> Receive:
    """Return a `receive` that replays a body already read, then passes on later messages."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return await then()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
