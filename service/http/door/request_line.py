"""Convert less usual request lines to what routes expect: absolute-form targets, and HEAD for every GET."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ABSOLUTE_FORM = re.compile(rb"https?://([^/]*)(.*)", re.IGNORECASE)
"""Scheme, authority and path of an absolute-form target; servers have removed the query."""


class OriginForm:
    """Rewrite `GET http://host/path`, which servers must accept (RFC 9112, 3.2.2), as `GET /path` with `Host: host`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (target := ABSOLUTE_FORM.fullmatch(scope.get("raw_path") or b"")) is not None:
            scope["raw_path"] = target[2] or b"/"
            scope["path"] = unquote(scope["raw_path"].decode("ascii"))  # as uvicorn does
            MutableHeaders(scope=scope)["host"] = target[1].decode("ascii")  # takes precedence over the header
        await self._app(scope, receive, send)


class HeadAsGet:
    """Answer HEAD like GET, without the body, on every route with a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_allowing_head(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 405:
                headers = MutableHeaders(scope=message)
                allowed = [method.strip() for method in headers.get("allow", "").split(",")]
                if "GET" in allowed and "HEAD" not in allowed:
                    headers["Allow"] = ", ".join([*allowed, "HEAD"])
            await send(message)

        # The server omits the body: it reads the method in its own copy of the scope
        as_get = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        await self._app(as_get, receive, send_allowing_head)
