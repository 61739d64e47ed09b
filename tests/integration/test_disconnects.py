"""Clients that disconnect at random moments, behind all middlewares; time is counted in engine steps."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from diffusion.network_inputs import NetworkInputs
from service.engine.async_engine import EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.ledger import Ledger
from service.http import app as http_app
from service.http.app import assemble
from service.http.state import ServiceState
from service.metrics import Metrics
from service.settings import Settings
from tests.counts import count
from tests.denoisers import ExactDenoiser
from tests.fakes import tiny_config
from tests.waiting import PATIENCE_S, eventually, run_async

REQUESTS = count(4000, 20)
IN_FLIGHT = 20
WIDTH = 4
GONE = 499


class GatedDenoiser(ExactDenoiser):
    """A network that can be gated: it then signals each call, and waits until the call is allowed."""

    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.gated = False
        self.arrived = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        if self.gated:
            self.arrived.release()
            assert self.let.acquire(timeout=PATIENCE_S)
        return super().__call__(inputs)


class Client:
    """A connection with one request, which may be closed early."""

    def __init__(self, number: int, draw: random.Random) -> None:
        self.number = number
        steps, n, cfg_scale = draw.randint(2, 12), draw.randint(1, 3), draw.choice((1, 2))
        self.row_steps = steps * n * cfg_scale
        self.body = {"seed": number, "steps": steps, "n": n, "cfg_scale": cfg_scale, "class": 0}
        self.gone = asyncio.Event()
        self.status: int | None = None
        self._sent = False

    async def ask(self, app: ASGIApp) -> None:
        """Send the request like a server that has read it from a socket."""
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/generate",
            "raw_path": b"/v1/generate",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": headers,
            "client": ("192.0.2.1", 1234),
            "server": ("localhost", 80),
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]


def test_disconnected_clients_free_their_rows_at_the_next_step_and_none_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []

    class KeptEngine(Engine):
        """An engine that the test can look into."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(http_app, "Engine", KeptEngine)

    async def check() -> None:
        denoiser = GatedDenoiser()
        app = assemble(Settings(models=(Path("m"),), max_rows=WIDTH), {"m": denoiser})
        async with app.router.lifespan_context(app):
            service: ServiceState = app.state.service
            await eventually(lambda: service.engine.state is not EngineState.STARTING)
            assert service.engine.state is EngineState.READY
            denoiser.gated = True
            clients = await storm(app, denoiser, made[0], service.engine.ledger, random.Random(0))
            await service.engine.wait_idle()
            check_nothing_is_left(made[0], service.engine.ledger)
            check_metrics(service.metrics, clients)

    run_async(check())


async def storm(
    app: ASGIApp, denoiser: GatedDenoiser, engine: Engine, ledger: Ledger, draw: random.Random
) -> list[Client]:
    """Keep clients in flight until all have ended; half of them disconnect at some step or before the first."""
    clients = [Client(number, draw) for number in range(REQUESTS)]
    doomed = set(draw.sample(clients, REQUESTS // 2))
    coming = iter(clients)
    asking: dict[asyncio.Task[None], Client] = {}
    freed: set[int] = set()
    arrival = asyncio.ensure_future(asyncio.to_thread(denoiser.arrived.acquire))
    while True:
        for client in itertools.islice(coming, IN_FLIGHT - len(asking)):
            asking[asyncio.create_task(client.ask(app))] = client
            if client in doomed and draw.random() < 0.1:
                client.gone.set()
        if not asking:
            break
        done, _ = await asyncio.wait({arrival, *asking}, return_when=asyncio.FIRST_COMPLETED)
        for task in [task for task in asking if task.done()]:
            del asking[task]
        if arrival in done:  # the engine waits in a network call
            assert not freed & {image.params.seed for image in ledger.orders}
            started = {image.params.seed for image in engine.scheduler.started()}
            assert not freed & started
            leaving = [
                task
                for task, client in asking.items()
                if client in doomed and draw.random() < (0.3 if client.number in started else 0.03)
            ]
            for task in leaving:
                asking[task].gone.set()
            if leaving:
                await asyncio.wait(leaving)
            freed = {client.number for client in clients if client.status == GONE}
            denoiser.let.release()
            arrival = asyncio.ensure_future(asyncio.to_thread(denoiser.arrived.acquire))
    denoiser.gated = False
    denoiser.arrived.release()  # for the thread that waits for another call
    await arrival
    assert {client.status for client in clients} == {200, GONE}
    assert {client.status for client in clients if client not in doomed} == {200}
    return clients


def check_nothing_is_left(engine: Engine, ledger: Ledger) -> None:
    scheduler = engine.scheduler
    assert not scheduler.has_work()
    assert scheduler.free_slots("m") == list(range(EngineConfig(max_rows=WIDTH).num_slots))
    assert engine.num_saved == 0
    assert ledger.rows == ledger.requests == len(ledger.orders) == 0


def check_metrics(metrics: Metrics, clients: list[Client]) -> None:
    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(name, labels)
        assert found is not None
        return found

    gone = sum(client.status == GONE for client in clients)
    assert gone > REQUESTS // 4
    assert value("iddpm_requests_total", outcome="cancelled") == gone
    assert value("iddpm_requests_total", outcome="ok") == REQUESTS - gone
    useful = sum(client.row_steps for client in clients if client.status == 200)
    # Images of clients that disconnected after the last step are delivered to no client, but their steps are not wasted
    assert value("iddpm_row_steps_total") >= useful + value("iddpm_wasted_row_steps_total")
    assert value("iddpm_wasted_row_steps_total") > 0
    for gauge in ("images_waiting", "images_running", "images_evicted", "remaining_row_steps"):
        assert value(f"iddpm_{gauge}") == 0
