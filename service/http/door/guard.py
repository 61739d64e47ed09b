"""Check the head of a request before its body is read: host, size, media type. A pure ASGI middleware.

Not a BaseHTTPMiddleware: behind one, a handler is not informed that its client has disconnected.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.hosts import canonical_host
from service.http.door.context import context_of
from service.http.health import HEALTH_PATHS, QUIET_PATHS
from service.http.interfaces import Interface, takes_form
from service.http.problems import problem
from service.http.routes import interface_of, routes_of

MAX_HEADER_BYTES = 32768
"""The HTTP parser stops longer heads, but not one that arrives in a single packet; that one is measured here."""


class Guard:
    """Rejects requests before they reach a handler.

    503 (too many connections), 421 (host), 431 (head), 400 (path), 403 (origin of a form), 415 (type).
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._allowed_hosts = frozenset(allowed_hosts)  # in the form of `canonical_host`

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
        if not context_of(scope).has_place and scope["path"] not in QUIET_PATHS:
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
        if scope["path"].endswith("\n"):  # a pattern's end matches before it, so a route would take the request
            return problem(400, "Bad request", "the path must not end with a line break")
        return _refusal_of_body(scope, headers) if scope["method"] == "POST" and _has_handler(scope) else None

    def _is_ours(self, host: str) -> bool:
        return "*" in self._allowed_hosts or _host_of(host) in self._allowed_hosts


def _refusal_of_body(scope: Scope, headers: Headers) -> Response | None:
    is_form = takes_form(scope["path"])
    if is_form and _from_another_origin(headers):
        return problem(403, "Forbidden", "Origin: a page of another origin cannot post forms here")
    expected = _expected_of_form(headers) if is_form else _expected_media_type(interface_of(scope), headers)
    if expected is not None:
        return problem(415, "Unsupported media type", f"Content-Type: must be {expected}")
    if headers.get("content-encoding", "identity").lower() != "identity":  # 64 KB could unpack to gigabytes
        refused = "Content-Encoding: compressed bodies are not accepted"
        return problem(415, "Unsupported media type", refused, headers={"Accept-Encoding": "identity"})
    return None


def _has_handler(scope: Scope) -> bool:
    """Return whether a route takes the request; otherwise it gets 404 or 405, independent of its body."""
    route = routes_of(scope).find(scope["path"])
    return route is not None and scope["method"] in route.methods


def _expected_media_type(interface: Interface, headers: Headers) -> str | None:
    """Return the media types that the body must be declared as; None: its declaration is correct.

    A browser lets a page of another origin send a body without a declaration, or declared as a form, without a
    preflight. So a declaration that forms cannot have is required. tritonclient sends tensors without one: that is
    allowed if the request is not from a browser, which would send Origin or Sec-Fetch-Site.
    """
    declared = _declared(headers)
    if declared == "application/json":
        return None
    if interface is not Interface.KSERVE:
        return "application/json"
    from_browser = "origin" in headers or "sec-fetch-site" in headers
    if declared == "application/octet-stream" or (not declared and not from_browser):
        return None
    return "application/json or application/octet-stream"


def _expected_of_form(headers: Headers) -> str | None:
    return None if _declared(headers) == "multipart/form-data" else "multipart/form-data"


def _from_another_origin(headers: Headers) -> bool:
    """Return whether a browser sends a form for a page of another origin, which needs no preflight.

    Browsers send Sec-Fetch-Site only to hosts that they trust (https, or this machine), and Origin with every POST. A
    page can set neither, and other clients send neither.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site != "same-origin"
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _declared(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _host_of(header: str) -> str:
    """Return the host of a Host header in the spelling of the settings; "" if it has none."""
    try:  # clients send ASCII; anything else is not valid, and expensive to parse
        return canonical_host(re.sub(r":\d*$", "", header)) if header.isascii() else ""
    except ValueError:
        return ""
