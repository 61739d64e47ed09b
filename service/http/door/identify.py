"""Identify the client: by API key if the service has keys, else by address. A pure ASGI middleware."""

from __future__ import annotations

import math
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.hosts import Network
from service.http.door.client import Client, client_of
from service.http.door.context import context_of
from service.http.door.key_ring import KeyRing
from service.http.door.keys import ApiKey
from service.http.door.rates import RequestRates
from service.http.health import HEALTH_PATHS
from service.http.problems import problem

OPEN_PATHS = HEALTH_PATHS | {"/", "/docs", "/openapi.json"}
"""Served without a key: health checks have none, the documentation is public, and the page asks for a key itself."""
OPEN_FOLDER = "/page/"


class Identify:
    """Writes the `Client` into the request's context; answers 401 without a valid key, 429 above a key's rate."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, trusted_proxies: Collection[Network]) -> None:
        self._app = app
        self._keys = keys
        self._trusted_proxies = trusted_proxies
        self._rates = RequestRates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._keys is None or _is_open(scope["path"]):
            client, refusal = self._by_address(scope, headers), None
        else:
            key = self._keys.find(_bearer(headers))
            if key is None:
                await _unauthorized(headers)(scope, receive, send)
                return
            client, refusal = Client(f"key:{key.name}", key.limits, key.admin), self._too_often(key, scope)
        context_of(scope).client = client
        await (refusal or self._app)(scope, receive, send)

    def _by_address(self, scope: Scope, headers: Headers) -> Client:
        peer = scope["client"][0] if scope.get("client") else ""
        return Client(client_of(peer, headers.getlist("x-forwarded-for"), self._trusted_proxies))

    def _too_often(self, key: ApiKey, scope: Scope) -> Response | None:
        limit = key.limits.requests_per_minute
        if limit is None or scope["method"] != "POST":
            return None
        wait_s = self._rates.take(key.name, limit)
        if not wait_s:
            return None
        detail = f"at most {limit} requests per minute with this key"
        return problem(429, "Too many requests", detail, headers={"Retry-After": str(math.ceil(wait_s))})


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(headers: Headers) -> Response:
    given = "authorization" in headers
    challenge = 'Bearer realm="iddpm"' + (', error="invalid_token"' if given else "")
    detail = "Authorization: " + ("not a valid key" if given else "this service needs a key: Authorization: Bearer KEY")
    return problem(401, "Unauthorized", detail, headers={"WWW-Authenticate": challenge})
