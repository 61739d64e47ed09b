"""The Ray Serve application, without a cluster: options, settings, health, the request's id."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from service.engine.watchdog import Watchdog
from service.http.server import STRAGGLER_SECONDS, engine_of
from service.settings import Settings
from tests.integration.exact_service import exact_app
from tests.paths import BUNDLED
from tests.waiting import runs

if TYPE_CHECKING:
    from deploy.ray import serve_app
else:
    pytest.importorskip("ray", reason="needs the extra ray")
    serve_app = pytest.importorskip("deploy.ray.serve_app")

SETTINGS = Settings(models=(BUNDLED,), max_rows=4, max_request_s=100, threads=1)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IDDPM_") and name != "IDDPM_TEST_LONG"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("IDDPM_MODELS", str(BUNDLED))
    monkeypatch.setenv("IDDPM_ALLOW_KEYLESS", "true")


def test_serve_gives_a_replica_four_requests_per_row_and_scales_on_its_rows() -> None:
    options = serve_app.deployment_options(serve_app.Fleet(min_replicas=2, max_replicas=3, cpus=2), SETTINGS)
    assert options["max_ongoing_requests"] == 16
    scaling = options["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 3, 4)
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}


def test_a_removed_replica_may_take_as_long_as_the_longest_request() -> None:
    options = serve_app.deployment_options(serve_app.Fleet(), SETTINGS)
    assert options["graceful_shutdown_timeout_s"] == 100 + STRAGGLER_SECONDS


def test_refusals_of_serve_have_retry_after() -> None:
    options = serve_app.deployment_options(serve_app.Fleet(max_queued_requests=5), SETTINGS)
    assert options["max_queued_requests"] == 5
    assert options["backpressure_config"].status_code == 503
    assert options["backpressure_config"].retry_after_s > 0


def test_on_cuda_a_replica_has_a_gpu_of_its_own() -> None:
    settings = SETTINGS.model_copy(update={"device": "cuda"})
    options = serve_app.deployment_options(serve_app.Fleet(), settings)
    assert options["ray_actor_options"]["num_gpus"] == 1


@pytest.mark.parametrize("arguments", [{"min_replicas": 2}, {"max_replicas": 0}, {"cpus": 0}, {"replicas": 2}])
def test_wrong_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(arguments))):
        serve_app.Fleet.model_validate(arguments)


def test_serve_can_read_the_arguments_that_a_command_line_gives_as_text() -> None:
    (parameter,) = inspect.signature(serve_app.build).parameters.values()  # Serve validates with a class only
    assert parameter.annotation is serve_app.Fleet
    assert serve_app.Fleet.model_validate({"max_replicas": "3", "cpus": "0.5"}).cpus == 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("IDDPM_MAX_ROW", "4", "unknown environment variable IDDPM_MAX_ROW"),
        ("IDDPM_PORT", "8000", "IDDPM_PORT has no effect: Ray Serve"),
        ("IDDPM_KEEP_ALIVE_S", "5", "IDDPM_KEEP_ALIVE_S has no effect"),
        ("IDDPM_DEVICE", "cuda:1", "set 'cuda'"),
        ("IDDPM_ALLOW_KEYLESS", "false", "no key is required"),
    ],
)
def test_settings_that_would_mislead_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        serve_app.read_settings()


def test_a_service_link_of_kubernetes_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDDPM_PORT", "tcp://10.0.0.1:8000")
    assert serve_app.read_settings().port == 0


@asynccontextmanager
async def begun(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[serve_app.Replica, FastAPI]]:
    """Start a replica as Serve does: constructor, application, lifespan."""
    monkeypatch.setattr(serve_app, "create_app", lambda settings, build: exact_app())
    monkeypatch.setattr(serve_app, "configure_logging", lambda: None)
    monkeypatch.setattr("sys.setswitchinterval", lambda seconds: None)
    replica = serve_app.Replica(SETTINGS)
    app = replica.__serve_build_asgi_app__()
    async with app.router.lifespan_context(app):
        yield replica, app


@runs
async def test_a_replica_is_healthy_once_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    async with begun(monkeypatch) as (replica, app):
        engine = engine_of(app)
        assert engine is not None
        assert engine.state.value == "starting"
        await replica.check_health()
        assert engine.state.value == "ready"
        engine.drain()
        await replica.check_health()  # a drain must not look like a failure


@runs
async def test_a_replica_whose_engine_died_is_unhealthy_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    monkeypatch.setattr(serve_app, "end_process", lambda code: ended.set())
    monkeypatch.setattr(serve_app, "DEATH_NOTICE_SECONDS", 0)
    async with begun(monkeypatch) as (replica, app):
        await replica.check_health()
        engine = engine_of(app)
        assert engine is not None
        monkeypatch.setattr(Watchdog, "hangs", lambda *_: True)
        await ended.wait()
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await replica.check_health()


@runs
@pytest.mark.parametrize(("given", "kept"), [("named-by-serve", False), ("not a valid id", True)])
async def test_an_answer_has_the_request_id_only_once(monkeypatch: pytest.MonkeyPatch, given: str, kept: bool) -> None:
    async with begun(monkeypatch) as (_, app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.get("/healthz", headers={"X-Request-ID": given})
    assert answer.status_code == 200
    assert ("x-request-id" in answer.headers) == kept
