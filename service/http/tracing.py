"""Tracing: report every request to a collector as OpenTelemetry spans. Imported only if the setting `traces` is on.

The span of a request has the children `queue`, `denoise` and `encode`. The first two are created when the request has
left the engine, from the times in its results: nothing is traced inside an engine step.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry.context import Context, get_current
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import (
    HTTP_REQUEST_METHOD,
    HTTP_RESPONSE_STATUS_CODE,
    HTTP_ROUTE,
)
from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_SCHEME
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.engine.request import ImageStatus
from service.engine.tickets import Ticket
from service.errors import TracingError
from service.http.door.context import context_of, status_of
from service.http.door.observe import CLIENT_CLOSED
from service.http.health import QUIET_PATHS
from service.http.routes import printable, template_of

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""Limit for sending the last traces, so that a collector that is down does not keep the process from ending."""
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
"""All other methods share one name, because the number of span names must be bounded."""


class Tracing:
    """Owns the tracer and the thread that sends spans. If the collector is down, spans are lost, but no requests."""

    def __init__(self, exporter_of: Callable[[], SpanExporter]) -> None:
        """Start reporting requests. The variables OTEL_* configure sampling, batches and the service's name.

        Args:
            exporter_of: returns a new exporter; called here, and by `open` after `close`.
        """
        self._exporter_of = exporter_of
        # Without baggage, which is not used here: the SDK would log an invalid one in full
        self._callers = TraceContextTextMapPropagator()
        self._is_open = False
        self.open()

    def open(self) -> None:
        """Start reporting again after `close`; else do nothing."""
        if self._is_open:
            return
        ours = Resource.create({SERVICE_NAME: "iddpm", SERVICE_VERSION: version("iddpm")})
        resource = ours.merge(OTELResourceDetector().detect())  # the operator's attributes take precedence
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter_of()))
        self._tracer = self._provider.get_tracer("iddpm", version("iddpm"))
        self._is_open = True

    @contextmanager
    def request(self, scope: Scope) -> Iterator[None]:
        """Trace a request up to the end of its answer, within the caller's trace if it sends a traceparent."""
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        name = "HTTP" if method == "_OTHER" else method
        path = {URL_PATH: printable(scope["path"]), URL_SCHEME: scope["scheme"]}
        span = self._tracer.start_span(
            name,
            context=self._callers.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={HTTP_REQUEST_METHOD: method, **path},
        )
        context = span.get_span_context()
        named = {"trace_id": format_trace_id(context.trace_id)} if context.is_valid else {}
        with (
            use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False),
            bound_contextvars(**named),  # for every log line from here on
        ):
            try:
                yield
            except BaseException as error:  # an answer that breaks off after its status has gone out; a cancelled task
                _fail(span, type(error).__name__)
                raise
            finally:
                self._describe_end(span, name, scope)

    def _describe_end(self, span: Span, name: str, scope: Scope) -> None:
        template, status = template_of(scope), status_of(scope)
        span.set_attribute("iddpm.request_id", context_of(scope).request_id)
        span.set_attribute(HTTP_RESPONSE_STATUS_CODE, status)
        if template is not None:
            span.update_name(f"{name} {template}")
            span.set_attribute(HTTP_ROUTE, template)
        if status >= 500 or status == CLIENT_CLOSED:
            _fail(span, str(status))

    def follow(self, ticket: Ticket, numerics_id: str) -> None:
        """Report an accepted request's time in the engine when it ends, with or without success."""
        within = get_current()
        ticket.ended.add_done_callback(lambda _: self._report_phases(ticket, numerics_id, within))

    def _report_phases(self, ticket: Ticket, numerics_id: str, within: Context) -> None:
        if not ticket.outcomes:
            return  # the engine has stopped with an error, so there are no times
        started = [outcome.queue_s for outcome in ticket.outcomes if outcome.compute_s > 0]
        ended = max(outcome.queue_s + outcome.compute_s for outcome in ticket.outcomes)
        begun = min(started, default=ended)
        failure, request = _failure(ticket), ticket.request
        submitted_ns = time.time_ns() - round((time.monotonic() - ticket.submitted_at) * 1e9)

        def record(name: str, begin_s: float, end_s: float, failure: str | None, **named: AttributeValue) -> None:
            attributes = {f"iddpm.{key}": value for key, value in named.items()}
            start_ns, end_ns = (submitted_ns + round(seconds * 1e9) for seconds in (begin_s, end_s))
            span = self._tracer.start_span(name, context=within, start_time=start_ns, attributes=attributes)
            if failure is not None:
                _fail(span, failure)
            span.end(end_ns)

        record("queue", 0.0, begun, None if started else failure)
        if started:
            record(
                "denoise",
                begun,
                ended,
                failure,
                model=request.name,
                images=len(request.images),
                rows=request.rows,
                row_steps=request.row_steps,
                numerics_id=numerics_id,
            )

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Trace the encoding of an answer, including the wait for a thread."""
        with self._tracer.start_as_current_span("encode", record_exception=False):
            yield

    def close(self) -> None:
        """Send the remaining spans; blocks for `CLOSE_SECONDS` at most."""
        self._is_open = False
        # The provider has no time limit; a daemon thread does not keep the process alive
        sending = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)
        if sending.is_alive():
            log.warning("the collector did not take the last traces within %g s; they are lost", CLOSE_SECONDS)


class Traced:
    """The outermost middleware with tracing: a span around each request, except health checks and metrics."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        with self._tracing.request(scope):
            await self._app(scope, receive, send)


def tracing_to_collector() -> Tracing:
    """Return tracing to the collector that the standard variables OTEL_* name, by default localhost:4318.

    Raises:
        TracingError: the variables name an exporter or a protocol that is not supported.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter != "otlp":
        raise TracingError(f"OTEL_TRACES_EXPORTER: must be otlp where IDDPM_TRACES is true; got {exporter!r}")
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if os.environ.get(name)), None)
    if name is not None and os.environ[name] != "http/protobuf":
        raise TracingError(f"{name}: must be http/protobuf (port 4318 of most collectors); got {os.environ[name]!r}")
    return Tracing(OTLPSpanExporter)


def _failure(ticket: Ticket) -> str | None:
    """Return why a request did not get all its images: the failure of an image takes precedence over aborts."""
    if reasons := [outcome.failure for outcome in ticket.outcomes if outcome.failure is not None]:
        return reasons[0]
    if any(outcome.status is ImageStatus.ABORTED for outcome in ticket.outcomes):
        return "aborted"
    return None if len(ticket.outcomes) == len(ticket.images) else "engine_stopped"


def _fail(span: Span, kind: str) -> None:
    span.set_status(StatusCode.ERROR)
    span.set_attribute(ERROR_TYPE, kind)
