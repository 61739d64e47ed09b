"""The service in Ray Serve: one replica actor per device, which runs the whole application with its own engine.

    serve run deploy.ray.serve_app:build max_replicas=4 cpus=2

Serve's proxy passes requests to the application inside the replica, so there is no deployment between them, and
Serve's batching is not used: the engine batches. deploy/ray/README.md is the runbook.
"""

# No `from __future__ import annotations`: Ray Serve reads the annotation of build's argument, which must be a class.

import asyncio
import logging
import os
import sys
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.engines import build_engines
from deploy.ray.devices import gpus_of, refuse_one_gpu, with_threads
from service.engine.async_engine import RETRY_WHILE_DRAINING_S, AsyncEngine, EngineState
from service.http.app import create_app
from service.http.server import DEATH_NOTICE_SECONDS, STRAGGLER_SECONDS, SWITCH_INTERVAL_S, end_process, engine_of
from service.logs import configure_logging
from service.settings import LINK_ADDRESS, PREFIX, Settings, refuse_unknown_variables

ONGOING_PER_ROW = 4
"""Requests that Serve gives a replica, per row of its width: the running batch, and enough behind it that the engine
can choose. The other requests wait at the proxy, which gives them to the replica that is free first."""
START_POLL_S = 0.1
"""Interval at which a starting replica looks whether its warm-up has ended."""
REQUEST_ID = "x-request-id"
NOT_OURS = ("host", "port", "read_timeout_s", "write_timeout_s", "keep_alive_s", "drain_notice_s")
"""Settings of the HTTP server that `iddpm serve` starts. Here, Serve's proxies listen, with Serve's own options."""

log = logging.getLogger(__name__)


class Fleet(BaseModel):
    """What Ray decides, given as arguments of `build`. All else is in the settings (`IDDPM_*`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(default=1, ge=1)
    """Replicas that always run."""
    max_replicas: int = Field(default=1, ge=1)
    """Most replicas; Serve adds one when the others have more requests than rows."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for a replica; without `IDDPM_THREADS`, also its threads, rounded down."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that a proxy holds and has not given to a replica yet; further ones get 503 with Retry-After. In a burst
    these are also requests for which a replica is free, so a small limit refuses too early."""

    @model_validator(mode="after")
    def _order_replicas(self) -> "Fleet":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} must not exceed max_replicas {self.max_replicas}")
        return self


class Replica:
    """One replica: application and engine in an actor. Ray Serve calls these methods, all in one event loop."""

    def __init__(self, settings: Settings) -> None:
        configure_logging()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if settings.threads is None:
            cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
            settings = with_threads(settings, cpus)
        self._app = self.application(settings)
        self._app.add_middleware(SingleRequestId)
        self._watch: asyncio.Task[None] | None = None

    def application(self, settings: Settings) -> FastAPI:
        """Create the application."""
        return create_app(settings, build_engines)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application. Serve runs its lifespan: the start of the engine, and its drain at the end."""
        return self._app

    async def check_health(self) -> None:
        """Return if the engine is alive. The first call, which ends Serve's initialisation, waits for the warm-up.

        Raises:
            RuntimeError: the engine has stopped with an error, or hangs.
        """
        engine = engine_of(self._app)
        if engine is None:
            raise RuntimeError("the lifespan of the application has not begun")
        while engine.state is EngineState.STARTING:
            await asyncio.sleep(START_POLL_S)
        if engine.state is EngineState.DEAD:
            raise RuntimeError("the engine has stopped with an error, or hangs")
        if self._watch is None:
            self._watch = asyncio.create_task(_end_with(engine))


class SingleRequestId:
    """Remove the header X-Request-ID from answers if Serve, which adds the request's id to every answer, repeats it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID)

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get(REQUEST_ID) == given:  # else the client's was refused, and this one is in the log
                    del headers[REQUEST_ID]
            await send(message)

        await self._app(scope, receive, send_without)


def build(fleet: Fleet) -> Any:
    """Return the Serve application. The settings are read here, and every replica gets the same ones.

    Raises:
        ValueError: a variable IDDPM_* is unknown, or its value is not allowed (pydantic's ValidationError).
    """
    return deployed(Replica, fleet, read_settings())


def deployed(replica: type[Replica], fleet: Fleet, settings: Settings) -> Any:
    """Return the Serve application of a kind of replica."""
    return serve.deployment(serve.ingress()(replica), **deployment_options(fleet, settings)).bind(settings)


def read_settings() -> Settings:
    """Read the settings from the environment.

    The address on which Serve's proxies listen is not known here. Clients on other machines may reach it, so keys are
    required unless `IDDPM_ALLOW_KEYLESS` is set.

    Raises:
        ValueError: a variable IDDPM_* is unknown or has no effect here, or its value is not allowed.
    """
    refuse_unknown_variables()
    for name in (PREFIX + field.upper() for field in NOT_OURS):
        if name in os.environ and not LINK_ADDRESS.match(os.environ[name]):
            raise ValueError(
                f"{name} has no effect: Ray Serve's proxies listen. Remove it, and use Serve's http_options"
            )
    settings = Settings(host="", port=0)
    refuse_one_gpu(settings)
    return settings


def deployment_options(fleet: Fleet, settings: Settings) -> dict[str, Any]:
    """Return the options of the Serve deployment."""
    return {
        "name": "iddpm",
        "ray_actor_options": {"num_cpus": fleet.cpus, "num_gpus": gpus_of(settings)},
        "max_ongoing_requests": ONGOING_PER_ROW * settings.max_rows,
        "max_queued_requests": fleet.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=RETRY_WHILE_DRAINING_S),
        "autoscaling_config": AutoscalingConfig(
            min_replicas=fleet.min_replicas,
            max_replicas=fleet.max_replicas,
            target_ongoing_requests=settings.max_rows,
        ),
        "logging_config": {"enable_access_log": False},  # the service logs every request
        # A replica that is removed finishes every request that it accepted
        "graceful_shutdown_timeout_s": settings.max_request_s + STRAGGLER_SECONDS,
    }


async def _end_with(engine: AsyncEngine) -> None:
    """End the process when the engine has died, as `iddpm serve` does: Serve then starts another replica at once."""
    await engine.reached(EngineState.DEAD)
    log.critical("the engine has died: this replica ends")
    await asyncio.sleep(DEATH_NOTICE_SECONDS)
    end_process(1)
