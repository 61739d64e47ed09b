"""Read the whole body, up to a limit, before a request is handled. A pure ASGI middleware."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.problems import problem


class WholeBody:
    """Passes on requests whose body is complete. One that is too long gets 413; one that breaks off gets no answer."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await self._too_long(Connection="close")(scope, receive, send)  # before any of it is read
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                await self._too_long()(scope, receive, send)
                return
        await self._app(scope, once(bytes(body), receive), send)

    def _too_long(self, **headers: str) -> Response:
        return problem(413, "Body too large", f"the body must be at most {self._max_bytes} bytes", headers=headers)


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
