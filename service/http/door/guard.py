"""The door: a pure ASGI middleware that looks at the head of a request before anything else does.

Not a BaseHTTPMiddleware, behind which a handler never learns that its client has gone.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.hosts import canonical_host
from service.http.health import HEALTH_PATHS, QUIET_PATHS
from service.http.interfaces import Interface
from service.http.problems import problem
from service.http.routes import interface_of, routes_of

MAX_HEADER_BYTES = 32768
"""The HTTP parser stops heads that grow beyond this; one that comes in a single packet is measured here."""
NO_PLACE = "no_place"
"""Item of a request's state, where its connection is one more than may be open."""


class Guard:
    """Refuses what no handler should see: 503 where there are too many connections, 421, 431, 415."""

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed_hosts = frozenset(allowed_hosts)  # each as `canonical_host` writes it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if NO_PLACE in scope.get("state", ()) and scope["path"] not in QUIET_PATHS:
            return problem(
                503,
                "Too many connections",
                "as many connections as may be open are busy",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        if scope["path"] not in HEALTH_PATHS and not self._is_ours(headers.get("host", "")):
            return problem(
                421,
                "Misdirected request",
                "Host: this service does not answer to that name; IDDPM_ALLOWED_HOSTS lists those it does",
            )
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            return problem(431, "Header fields too large", f"the headers must be at most {MAX_HEADER_BYTES} bytes")
        return _refusal_of_body(scope, headers) if scope["method"] == "POST" and _has_handler(scope) else None

    def _is_ours(self, host: str) -> bool:
        return "*" in self._allowed_hosts or _host_of(host) in self._allowed_hosts


def _refusal_of_body(scope: Scope, headers: Headers) -> Response | None:
    if (expected := _expected_media_type(interface_of(scope), headers)) is not None:
        return problem(415, "Unsupported media type", f"Content-Type: must be {expected}")
    if headers.get("content-encoding", "identity").lower() != "identity":  # 64 KB could unpack to gigabytes
        refused = "Content-Encoding: compressed bodies are not accepted"
        return problem(415, "Unsupported media type", refused, headers={"Accept-Encoding": "identity"})
    return None


def _has_handler(scope: Scope) -> bool:
    """Return whether a route would take the request; otherwise it gets 404 or 405, whatever its body is."""
    route = routes_of(scope).find(scope["path"])
    return route is not None and scope["method"] in route.methods


def _expected_media_type(interface: Interface, headers: Headers) -> str | None:
    """Return what a body should be declared as; None: as it is.

    A page of another origin may send what a form can send, or nothing declared, without asking. So bodies are declared,
    as what forms do not send; but tensors from tritonclient are not. It is no browser: those name the page's origin.
    """
    declared = headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared == "application/json":
        return None
    if interface is not Interface.KSERVE:
        return "application/json"
    from_browser = "origin" in headers or "sec-fetch-site" in headers
    if declared == "application/octet-stream" or (not declared and not from_browser):
        return None
    return "application/json or application/octet-stream"


def _host_of(header: str) -> str:
    """Return the host that a Host header names, as the settings write it; "" where it names none."""
    try:  # other than ASCII is never sent by a client that keeps to the rules, and costs much to read
        return canonical_host(re.sub(r":\d*$", "", header)) if header.isascii() else ""
    except ValueError:
        return ""
