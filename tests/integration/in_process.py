"""A complete app in this process: of settings, or around a network whose calls a test can hold back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from diffusion.network_inputs import NetworkInputs
from service.http.app import assemble
from service.http.tracing import Tracing
from service.settings import Settings
from tests.denoisers import ExactDenoiser
from tests.fakes import tiny_config
from tests.waiting import PATIENCE_S, POLL_S, eventually, until

WIDTH, QUEUE, LATE = 2, 5, 4


class PausedDenoiser(ExactDenoiser):
    """A network that computes only while it is allowed to; it is at start-up."""

    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.let = threading.Event()
        self.let.set()
        self._steps = threading.Semaphore(0)

    def let_steps(self, count: int) -> None:
        """Let this number of calls through, and hold back the rest."""
        self._steps.release(count)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        if not self.let.is_set():
            self._wait()
        return super().__call__(inputs)

    def _wait(self) -> None:
        until(lambda: self._steps.acquire(timeout=0.001) or self.let.is_set(), poll_s=0)


class Overflowing(PausedDenoiser):
    """A network whose output overflows for one class."""

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        out = super().__call__(inputs)
        out[np.asarray(inputs.y) == 3] *= np.float32("nan")
        return out


class Service:
    """A running app, and clients that reach it from any address."""

    def __init__(self, app: Any, denoiser: PausedDenoiser) -> None:
        self.denoiser = denoiser
        self.app = app

    async def ask(self, method: str, path: str, peer: str = "192.0.2.1", **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S) as client:
            return await client.request(method, path, **options)

    async def generate(self, peer: str = "192.0.2.1", forwarded_for: str | None = None, **body: Any) -> httpx.Response:
        headers = {} if forwarded_for is None else {"X-Forwarded-For": forwarded_for}
        return await self.ask("POST", "/v1/generate", peer, json=body, headers=headers)

    async def metric(self, name: str, **labels: str) -> float:
        text = (await self.ask("GET", "/metrics")).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return next(sample.value for sample in samples if sample.labels == labels)

    async def ready(self) -> None:
        """Wait until the service accepts requests."""
        while (await self.ask("GET", "/readyz")).status_code != 200:
            await asyncio.sleep(POLL_S)

    async def until_accepted(self, requests: int) -> None:
        """Wait until the engine has accepted this number of requests since its start."""
        await eventually(lambda: self._accepted_at_least(requests))

    async def _accepted_at_least(self, requests: int) -> bool:
        return await self.metric("iddpm_predicted_wait_seconds_count") >= requests

    async def until(self, condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        await eventually(condition)


@asynccontextmanager
async def running(
    denoiser: PausedDenoiser | None = None, tracing: Tracing | None = None, **settings: Any
) -> AsyncIterator[Service]:
    denoiser = denoiser or PausedDenoiser()
    chosen = Settings(models=(Path("m"),), max_rows=WIDTH, max_queue=QUEUE, **settings)
    app = assemble(chosen, {"m": denoiser}, tracing=tracing)
    async with app.router.lifespan_context(app):
        service = Service(app, denoiser)
        await service.ready()
        try:
            yield service
        finally:
            denoiser.let.set()


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run an app, and yield a client when it accepts requests."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S) as client,
    ):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(POLL_S)
        yield client
