"""The door: a pure ASGI middleware that looks at hosts, content types and body sizes before anything is parsed.

Not a BaseHTTPMiddleware, behind which a handler never learns that its client has gone.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem


class Guard:
    """Refuses what no handler should see: 421, 415, 413."""

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str], max_body_bytes: int) -> None:
        self._app = app
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._max_body_bytes = max_body_bytes
        self._limit = f"the body must be at most {max_body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = _without_port(headers.get("host", "").lower())
        if "*" not in self._allowed_hosts and host not in self._allowed_hosts:
            return problem(
                421,
                "Misdirected request",
                "Host: this service does not answer to that name; IDDPM_ALLOWED_HOSTS lists those it does",
            )
        if scope["method"] == "POST":
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                return problem(415, "Unsupported media type", "Content-Type: must be application/json")
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > self._max_body_bytes:
                return problem(413, "Body too large", self._limit, headers={"Connection": "close"})
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Stop a body without declared length once it is too long."""
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_body_bytes:
                    raise HTTPException(413, self._limit)
            return message

        return receive_limited


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host) if not host.endswith("]") else host
