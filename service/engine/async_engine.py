"""AsyncEngine: the engine as the event loop sees it. It connects admission, tickets and the engine's thread.

A request is accepted by `Admission`, waits in `Tickets`, and is made in `EngineThread`. Whatever ends the thread ends
every waiting request with it, and so does a step that hangs.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import assert_never

from service.engine.activity import Activity
from service.engine.admission import Admission
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.forecast import Prediction
from service.engine.ledger import Ledger
from service.engine.mailbox import Mailbox
from service.engine.request import GenerationRequest, ImageResult
from service.engine.runners.base import Runner
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts
from service.engine.thread import (
    Abort,
    Command,
    Died,
    Drop,
    EngineThread,
    Enter,
    ImagesEnded,
    Load,
    Loaded,
    Observed,
    Report,
    Stop,
    Stopped,
    Warm,
)
from service.engine.tickets import Ticket, Tickets
from service.engine.watchdog import LOOK_EVERY_S, Watchdog
from service.errors import Draining, EngineDead
from service.metrics import Metrics

log = logging.getLogger(__name__)

RETRY_WHILE_DRAINING_S = 10.0
"""Sent to clients of a replica that is not ready: another one will answer sooner, this address perhaps later."""


class EngineState(enum.Enum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class AsyncEngine:
    """Starts the engine's thread, accepts requests for it and ends it. Belongs to the event loop that started it."""

    def __init__(
        self,
        engine: Engine,
        config: EngineConfig,
        metrics: Metrics,
        on_state: Callable[[EngineState], None] | None = None,
    ) -> None:
        self.state = EngineState.STARTING
        self.died = asyncio.Event()
        """Set when the engine has stopped with an error, or hangs."""
        self._engine = engine
        """Its thread's; here only `snapshot`, `under_way`, `clock` and `activity` are read."""
        self._metrics = metrics
        self._on_state = on_state
        self._admission = Admission(config, engine.costs)
        self._tickets = Tickets(metrics, engine.activity)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._mailbox = Mailbox()
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._stopped = asyncio.Event()
        """Set when the thread has ended, or has been given up."""
        self._watch: asyncio.Task[None] | None = None

    @property
    def ledger(self) -> Ledger:
        """Return the account of accepted work; to be read only."""
        return self._admission.ledger

    @property
    def snapshot(self) -> Snapshot:
        """Return the engine as it was last published."""
        return self._engine.snapshot

    @property
    def activity(self) -> Activity:
        """Return what the models have done since the process began; to be read only."""
        return self._engine.activity

    @property
    def models_held(self) -> int:
        """Models in memory: those that requests may be for, and those whose last images are being made."""
        return len(self.ledger.models)

    def start(self) -> None:
        """Start the thread: it warms up, then turns the state to READY."""
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._watch_for_hangs())
        thread = EngineThread(self._engine, self._commands, self._mailbox, loop, self._on_report)
        threading.Thread(target=thread.run, name="engine", daemon=True).start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Accept a request, or refuse it before any work is done.

        Raises:
            Draining: starting up, shutting down, or stopped with an error.
            InvalidRequest, QueueFull, ClientLimit, DeadlineUnmeetable, UnknownModel: as `Admission.accept`.
        """
        self._check_ready()
        now = time.monotonic()
        images, prediction = self._admission.accept(request, now, self.snapshot)
        ticket = self._tickets.open(request, now, prediction, lambda: self.eta(request.request_id))
        self._commands.put(Enter(images))
        return ticket

    def abort(self, request_id: str) -> None:
        """Free a request's rows at the next step; its unfinished images end with `Aborted`, its events end here."""
        if request_id in self._tickets:
            self._commands.put(Abort(request_id))
            self._tickets.close_events(request_id)

    def eta(self, request_id: str) -> Prediction | None:
        """Predict when an accepted request will be done; None: it has ended, or is unknown."""
        return self._admission.eta(request_id, self.snapshot)

    async def load(self, model: str, runner: Runner, costs: StepCosts) -> None:
        """Take a model in between two steps; requests for it are accepted when this returns.

        Args:
            model: an id that no model has had before.
            runner: warmed up. It is the engine's from here on.
            costs: what its steps take.

        Raises:
            Draining: starting up, shutting down, or stopped with an error.
            EngineDead: the engine stopped meanwhile.
        """
        self._check_ready()
        loaded = self._loading[model] = asyncio.get_running_loop().create_future()
        self._commands.put(Load(model, runner, costs))
        await asyncio.shield(loaded)

    def retire(self, model: str) -> None:
        """Accept no more requests for a model; its weights go with the last of its images."""
        self._admission.retire_model(model)
        self._drop_finished_models()

    def drain(self) -> None:
        """Refuse new requests from now on; accepted ones go on."""
        if self.state in (EngineState.STARTING, EngineState.READY):
            self._set_state(EngineState.DRAINING)

    async def wait_idle(self) -> None:
        """Wait until no accepted request is unfinished."""
        await self._tickets.wait_empty()

    async def stop(self) -> None:
        """Drain, wait for accepted requests, end the thread; one that hangs is left behind."""
        self.drain()
        await self.wait_idle()
        self._commands.put(Stop())
        await self._stopped.wait()
        if self._watch is not None:
            self._watch.cancel()
        if self.state is not EngineState.DEAD:
            self._set_state(EngineState.STOPPED)

    def _check_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise Draining(f"the engine is {self.state.value}", RETRY_WHILE_DRAINING_S)

    def _drop_finished_models(self) -> None:
        # Here and not in the engine's thread: predictions read models until the loop knows that all images have ended
        for model in self._admission.remove_finished_models():
            self._commands.put(Drop(model))

    def _on_report(self, report: Report) -> None:
        match report:
            case Warm():
                if self.state is EngineState.STARTING:
                    self._set_state(EngineState.READY)
            case Loaded(model):
                self._on_loaded(model)
            case ImagesEnded(results):
                self._on_results(results)
            case Observed():
                self._tickets.observe(self._mailbox.take())
            case Died(message):
                self._die(message)
            case Stopped():
                self._stopped.set()
            case _:
                assert_never(report)

    def _on_loaded(self, model: str) -> None:
        loading = self._loading.pop(model, None)
        if loading is not None:  # else the engine has died meanwhile
            self._admission.add_model(model)
            loading.set_result(None)

    def _on_results(self, results: list[ImageResult]) -> None:
        for result in results:
            if result.request_id in self._tickets:  # else the engine was declared dead while a step hung
                self._admission.release(result.request_id, result.position)  # first: events predict what is left
                self._tickets.image_ended(result)
        self._drop_finished_models()

    async def _watch_for_hangs(self) -> None:
        watchdog = Watchdog()
        while self.state is not EngineState.DEAD:
            if watchdog.hangs(self._engine.under_way, self._engine.clock()):
                log.critical("a step of the engine hangs")
                self._die("a step of the engine hangs")
                self._stopped.set()  # no wait for the thread may be without an end
            await asyncio.sleep(LOOK_EVERY_S)

    def _die(self, message: str) -> None:
        if self.state is EngineState.DEAD:
            return
        self._set_state(EngineState.DEAD)
        self._commands.put(Stop())  # for a thread that hangs, should its step return
        self._admission.release_all()
        self._tickets.fail_all(message)
        for loading in self._loading.values():
            loading.set_exception(EngineDead(message))
        self._loading.clear()
        self.died.set()

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._metrics.ready.set(state is EngineState.READY)
        if self._on_state is not None:
            self._on_state(state)
