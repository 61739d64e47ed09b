"""Give every answer an id, log every request and count it. A pure ASGI middleware."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.door.context import context_of
from service.http.door.security_headers import SECURITY_HEADERS
from service.http.health import QUIET_PATHS
from service.http.interfaces import generates
from service.http.problems import problem
from service.http.routes import printable
from service.logs import REQUEST_FIELDS
from service.metrics import Metrics, Outcome

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
CLIENT_CLOSED = 499
REFUSED = frozenset({429, 503})
"""The request is valid and may be sent again."""


class Observe:
    """The outermost middleware that sees every answer, but for tracing: it names, logs and counts each one once."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        context_of(scope).request_id = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):  # for every log line from here on
            await self._serve(scope, receive, send, request_id)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        begun = time.perf_counter()
        status = CLIENT_CLOSED  # unless an answer begins

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED  # the client did not get the whole answer
            raise
        except Exception as error:
            log.error("unexpected error", exc_info=error)
            if status != CLIENT_CLOSED:
                status = 500
                raise  # an answer had begun: the only option is to close the connection
            await problem(500, "Internal error", "something went wrong here; the log has the details")(
                scope, receive, send_named
            )
        finally:
            context = context_of(scope)
            if context.status is None:
                context.status = status
            self._record(scope, context.status, time.perf_counter() - begun)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        if generates(scope["method"], path):
            outcome = outcome_of(status)
            self._metrics.requests.labels(outcome).inc()
            if outcome == "ok":
                self._metrics.request_seconds.observe(seconds)
        level = logging.DEBUG if path in QUIET_PATHS else logging.INFO
        client = context_of(scope).client
        client_name = "-" if client is None else client.name
        fields = (scope["method"], printable(path), status, round(seconds, 3), client_name)
        log.log(level, "%s %s %d %.3fs %s", *fields, extra=dict(zip(REQUEST_FIELDS, fields, strict=True)))


def outcome_of(status: int) -> Outcome:
    """Return the outcome of a generation request, by the status of its answer."""
    if status < 400:
        return "ok"
    if status == CLIENT_CLOSED:
        return "cancelled"
    if status in REFUSED:
        return "rejected"
    return "invalid" if status < 500 else "failed"
