"""Traces of the complete app: the spans of a request for every outcome of request, client and collector."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from service.errors import TracingError
from service.http import tracing as tracing_module
from service.http.app import assemble, create_app
from service.http.door.keys import ApiKey, hash_of
from service.http.door.keys_file import write_keys
from service.http.tracing import Tracing, tracing_to_collector
from service.settings import Settings
from tests.integration.collector import collecting
from tests.integration.in_process import WIDTH, Overflowing, PausedDenoiser, Service, running
from tests.integration.streams import streaming
from tests.waiting import PATIENCE_S, runs

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY: dict[str, Any] = {"class": "Bee", "steps": 3, "seed": 7, "cfg_scale": 2.0}


class Exported:
    """A tracer, and the spans that it has exported when its app ends."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._new_exporter)

    def _new_exporter(self) -> InMemorySpanExporter:
        self.exporter = InMemorySpanExporter()
        return self.exporter

    def names(self) -> list[str]:
        return [span.name for span in self.exporter.get_finished_spans()]

    def by_name(self) -> dict[str, ReadableSpan]:
        """Return the spans by name; each name occurs once."""
        spans = {span.name: span for span in self.exporter.get_finished_spans()}
        assert len(spans) == len(self.names())
        return spans


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def milliseconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


@runs
async def test_a_request_has_a_span_that_contains_queue_denoise_and_encode() -> None:
    exported = Exported()
    async with running(tracing=exported.tracing) as service:
        answer = await service.ask("POST", "/v1/generate", json=BODY, headers={"X-Request-ID": "mine"})
    image = answer.json()["images"][0]

    spans = exported.by_name()
    request = spans.pop("POST /v1/generate")
    assert (request.kind, request.parent, request.status.status_code) == (SpanKind.SERVER, None, StatusCode.UNSET)
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/generate",
        "http.response.status_code": 200,
        "url.path": "/v1/generate",
        "url.scheme": "http",
        "iddpm.request_id": "mine",
    }
    assert set(spans) == {"queue", "denoise", "encode"}
    for span in spans.values():
        assert span.parent == request.context
        assert span.status.status_code is StatusCode.UNSET
    assert milliseconds(spans["queue"]) == pytest.approx(image["queue_ms"], abs=0.002)
    assert milliseconds(spans["denoise"]) == pytest.approx(image["compute_ms"], abs=0.002)
    assert spans["queue"].end_time == spans["denoise"].start_time
    assert attributes(spans["denoise"]) == {
        "iddpm.model": "m",
        "iddpm.images": 1,
        "iddpm.rows": 2,
        "iddpm.row_steps": 6,
        "iddpm.numerics_id": answer.json()["numerics_id"],
    }


@runs
async def test_a_request_joins_its_callers_trace_whose_id_is_in_every_log_line() -> None:
    exported, ids = Exported(), []

    class Ids(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ids.append(structlog.contextvars.get_contextvars().get("trace_id"))

    observe, handler = logging.getLogger("service.http.door.observe"), Ids()
    observe.addHandler(handler)
    observe.setLevel(logging.INFO)
    try:
        async with running(tracing=exported.tracing) as service:
            for sampled in ("01", "00"):
                headers = {"traceparent": f"00-{TRACE}-{CALLER}-{sampled}"}
                await service.ask("POST", "/v1/generate", json=BODY, headers=headers)
            await service.ask("GET", "/v1/models", headers={"traceparent": "00-none-of-it-01"})
    finally:
        observe.removeHandler(handler)
        observe.setLevel(logging.NOTSET)

    spans = exported.by_name()  # one of each: the second caller does not want to be traced
    request, own = spans["POST /v1/generate"], spans["GET /v1/models"]
    assert request.parent is not None
    assert (format_trace_id(request.parent.trace_id), format_span_id(request.parent.span_id)) == (TRACE, CALLER)
    assert {format_trace_id(spans[name].context.trace_id) for name in ("queue", "denoise", "encode")} == {TRACE}
    assert own.parent is None
    assert ids == [TRACE, TRACE, format_trace_id(own.context.trace_id)]


@runs
async def test_the_span_of_a_stream_ends_with_the_stream() -> None:
    exported = Exported()
    async with running(tracing=exported.tracing) as service:
        async with streaming(service.app, **BODY, preview_every=1) as client:
            await client.take()
            streamed_in_part = time.time_ns()
            last = (await client.rest())[-1]
        assert last.name == "completed"
    spans = exported.by_name()
    assert set(spans) == {"POST /v1/generate", "queue", "denoise", "encode"}
    request = spans.pop("POST /v1/generate")
    assert request.end_time is not None
    assert request.end_time >= streamed_in_part
    assert all(span.parent == request.context for span in spans.values())


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_that_fails_marks_its_request_and_where_it_failed(stream: bool) -> None:
    exported = Exported()

    @runs
    async def check() -> None:
        async with running(Overflowing(), exported.tracing) as service:
            failing: dict[str, Any] = {"class": [1, 3], "steps": 900, "cfg_scale": 1}
            if stream:
                async with streaming(service.app, **failing) as client:
                    await client.rest()
            else:
                assert (await service.generate(**failing)).status_code == 500

    check()
    spans = exported.by_name()
    assert set(spans) == {"POST /v1/generate", "queue", "denoise"}
    assert spans["queue"].status.status_code is StatusCode.UNSET
    for name, error in {"POST /v1/generate": "500", "denoise": "not_finite"}.items():
        assert spans[name].status.status_code is StatusCode.ERROR
        assert attributes(spans[name])["error.type"] == error
    assert attributes(spans["POST /v1/generate"])["http.response.status_code"] == 500


@runs
async def test_spans_of_disconnected_clients_are_exported_to_their_end() -> None:
    exported = Exported()
    async with running(tracing=exported.tracing) as service:
        service.denoiser.let.clear()
        async with streaming(service.app, n=2, steps=1000, cfg_scale=1) as started:
            service.denoiser.let_steps(1)
            while (event := await started.take()) is None or event.name != "progress":
                pass
            async with streaming(service.app, n=1, steps=1000, cfg_scale=1) as waiting:
                await waiting.take()
                waiting.go_away()
                await asyncio.wait([waiting.answering])
        # The server cut off the other answer, as uvicorn does with answers that outlast a drain
        service.denoiser.let.set()
        await service.app.state.service.engine.wait_idle()
    exported.tracing.close()
    spans = exported.exporter.get_finished_spans()
    assert sorted(span.name for span in spans) == [*["POST /v1/generate"] * 2, "denoise", "queue", "queue"]
    (denoise,) = (span for span in spans if span.name == "denoise")
    queues = {span.parent == denoise.parent: span for span in spans if span.name == "queue"}
    assert queues[True].status.status_code is StatusCode.UNSET
    for span in (denoise, queues[False]):
        assert span.status.status_code is StatusCode.ERROR
        assert attributes(span)["error.type"] == "aborted"
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    assert [attributes(span)["error.type"] for span in requests] == ["499", "499"]


@runs
async def test_span_names_have_no_values_and_health_is_not_traced() -> None:
    exported = Exported()
    async with running(tracing=exported.tracing) as service:
        infer = {"inputs": [{"name": "steps", "shape": [1], "datatype": "INT64", "data": [2]}]}
        assert (await service.ask("POST", "/v2/models/m/infer", json=infer)).status_code == 200
        images = {"prompt": "bee", "steps": 2}
        assert (await service.ask("POST", "/v1/images/generations", json=images)).status_code == 200
        assert (await service.ask("POST", "/v1/generate", json={"n": 0})).status_code == 422
        for path in ("/v2/models/m/versions/1/ready", "/nowhere", "/page/main.js", "/healthz", "/metrics"):
            await service.ask("GET", path)
        await service.ask("BREW", "/v1/models/m")
    phases = ["queue", "denoise", "encode"]
    assert sorted(exported.names()) == sorted(
        [
            *["POST /v2/models/{model}/infer", *phases],
            *["POST /v1/images/generations", *phases],
            "POST /v1/generate",
            "GET /v2/models/{model}/versions/{version}/ready",
            "GET",
            "GET",
            "HTTP /v1/models/{model}",
        ]
    )


def test_the_collector_of_the_standard_variables_gets_spans_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, key = tmp_path / "keys.json", "iddpm_secret"
    write_keys(keys, [ApiKey(name="alice", sha256=hash_of(key))])
    monkeypatch.setattr(tracing_module, "CLOSE_SECONDS", PATIENCE_S)
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")

        @runs
        async def check() -> None:
            async with running(tracing=tracing_to_collector(), keys_file=keys) as service:
                headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "hush"}
                for token in (key, "iddpm_wrong"):
                    headers["Authorization"] = f"Bearer {token}"
                    await service.ask("POST", "/v1/generate?key=hidden", json=BODY | {"seed": 987654}, headers=headers)

        check()
    assert collector.paths == {"/v1/traces"}
    assert sorted(span.name for span in collector.spans) == ["POST", "POST /v1/generate", "denoise", "encode", "queue"]
    exported = {item.key: item.value.string_value for item in collector.resources[0].resource.attributes}
    assert (exported["service.name"], exported["deployment.environment.name"]) == ("iddpm", "test")
    for secret in (b"secret", b"wrong", b"hush", b"hidden", b"987654", b"Bee", b"alice"):
        assert all(secret not in body for body in collector.bodies)


def test_a_collector_that_is_down_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")  # of the last attempt; the default is 10 s
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")

    @runs
    async def check() -> None:
        async with running(tracing=tracing_to_collector()) as service:
            answers = [await service.generate(**BODY) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5

    check()


def test_a_stuck_collector_does_not_prevent_shutdown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = threading.Event()

    class Stuck(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            taken.wait()
            return SpanExportResult.SUCCESS

    monkeypatch.setattr(tracing_module, "CLOSE_SECONDS", 0.01)

    @runs
    async def check() -> None:
        async with running(tracing=Tracing(Stuck)) as service:
            assert (await service.generate(**BODY)).status_code == 200

    try:
        check()
    finally:
        taken.set()
    assert "did not take the last traces" in caplog.text


@runs
async def test_a_second_lifespan_is_traced_too() -> None:
    traced, denoiser = Exported(), PausedDenoiser()
    app = assemble(Settings(models=(Path("m"),), max_rows=WIDTH), {"m": denoiser}, tracing=traced.tracing)
    for _ in range(2):
        async with app.router.lifespan_context(app):
            service = Service(app, denoiser)
            await service.ready()
            assert (await service.generate(**BODY)).status_code == 200
        assert "queue" in traced.names()
        traced.exporter.clear()


def test_a_global_tracer_gets_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)  # FastAPI looks for one

    @runs
    async def check() -> None:
        async with running() as service:
            assert (await service.ask("GET", "/v1/models?key=hidden")).status_code == 200

    check()
    assert not exporter.get_finished_spans()


def test_tracing_without_its_packages_ends_start_up_with_the_command_to_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "service.http.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        TracingError, match=r"need opentelemetry.sdk.trace, .* pip install -c constraints.txt -e '\.\[otel\]'"
    ):
        create_app(Settings(models=(tmp_path,), traces=True))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_unknown_exporters_and_protocols_are_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(TracingError, match=f"{variable}: must be .*; got '{value}'"):
        tracing_to_collector()
