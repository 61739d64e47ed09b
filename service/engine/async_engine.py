"""AsyncEngine: the event loop's interface to the engine. Connects admission, tickets and the engine thread.

`Admission` accepts a request, `Tickets` tracks it and `EngineThread` computes it. When the thread stops or a step
hangs, every pending request fails.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import queue
import threading
import time
from contextlib import suppress
from typing import assert_never

from service.engine.activity import Activity
from service.engine.admission import Admission
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.forecast import Prediction
from service.engine.ledger import Ledger
from service.engine.mailbox import Mailbox
from service.engine.request import GenerationRequest, Image, ImageResult
from service.engine.runners.base import Runner
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts
from service.engine.thread import (
    Abort,
    Advanced,
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
from service.engine.watchdog import CHECK_INTERVAL_S, Watchdog
from service.errors import Draining, EngineDead
from service.metrics import Metrics

log = logging.getLogger(__name__)

RETRY_WHILE_DRAINING_S = 10.0
"""Retry-After of a replica that is not ready, in seconds. Another replica may answer sooner."""


class EngineState(enum.Enum):
    """Lifecycle state of the engine."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class AsyncEngine:
    """Starts and stops the engine thread and submits requests to it. Runs in the event loop that started it."""

    def __init__(self, engine: Engine, config: EngineConfig, metrics: Metrics) -> None:
        self._state = EngineState.STARTING
        self._reached = {state: asyncio.Event() for state in EngineState}
        self._engine = engine
        """Owned by the engine thread; this class reads only `snapshot`, `under_way`, `clock` and `activity`."""
        self._metrics = metrics
        self._admission = Admission(config, engine.costs)
        self._tickets = Tickets(metrics, engine.activity)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._mailbox = Mailbox()
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._stopped = asyncio.Event()
        """Set when the thread has ended or was abandoned."""
        self._watch: asyncio.Task[None] | None = None

    @property
    def state(self) -> EngineState:
        """Return the lifecycle state."""
        return self._state

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of accepted work; read-only."""
        return self._admission.ledger

    @property
    def snapshot(self) -> Snapshot:
        """Return the last published snapshot of the engine."""
        return self._engine.snapshot

    @property
    def activity(self) -> Activity:
        """Return the work of each model since the process started; read-only."""
        return self._engine.activity

    @property
    def models_held(self) -> int:
        """Return the number of models in memory: those that accept requests and those finishing their last images."""
        return len(self.ledger.models)

    def start(self) -> None:
        """Start the thread. The state becomes READY after the warm-up."""
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._watch_for_hangs())
        thread = EngineThread(self._engine, self._commands, self._mailbox, loop, self._on_report)
        threading.Thread(target=thread.run, name="engine", daemon=True).start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Accept a request, or reject it before any work is done.

        Raises:
            Draining: the engine is starting, draining, stopped or dead.
            InvalidRequest, QueueFull, ClientLimit, DeadlineUnmeetable, TooLong, UnknownModel: as `Admission.accept`.
        """
        self.check_ready()
        now = time.monotonic()
        images, prediction = self._admission.accept(request, now, self.snapshot)
        ticket = self._tickets.open(request, now, prediction, lambda: self.eta(request.request_id))
        self._commands.put(Enter(images))
        return ticket

    def abort(self, request_id: str) -> None:
        """Abort a request: close its events now and free its rows at the next step.

        Its unfinished images end with `Aborted`.
        """
        if request_id in self._tickets:
            self._commands.put(Abort(request_id))
            self._tickets.close_events(request_id)

    def eta(self, request_id: str) -> Prediction | None:
        """Predict when an accepted request will finish; None if it has ended or is unknown."""
        return self._admission.eta(request_id, self.snapshot)

    async def load(self, model: str, runner: Runner, costs: StepCosts) -> None:
        """Load a model between two steps. Requests for it are accepted once this returns.

        Args:
            model: an id that has never been used before.
            runner: a warmed-up runner; the engine takes ownership.
            costs: measured costs of the runner's steps.

        Raises:
            Draining: the engine is starting, draining, stopped or dead.
            EngineDead: the engine died while loading.
        """
        self.check_ready()
        loaded = self._loading[model] = asyncio.get_running_loop().create_future()
        self._commands.put(Load(model, runner, costs))
        await asyncio.shield(loaded)

    def retire(self, model: str) -> None:
        """Stop accepting requests for a model; its weights are freed when its last image has ended."""
        self._admission.retire_model(model)
        self._drop_finished_models()

    def drain(self) -> None:
        """Reject new requests from now on; accepted requests continue."""
        if self.state in (EngineState.STARTING, EngineState.READY):
            self._set_state(EngineState.DRAINING)

    async def reached(self, state: EngineState) -> None:
        """Wait until the engine is, or was, in this state: READY after the warm-up, DEAD after an error or a hang."""
        await self._reached[state].wait()

    async def wait_idle(self) -> None:
        """Wait until every accepted request has ended."""
        await self._tickets.wait_empty()

    async def stop(self) -> None:
        """Drain, wait for accepted requests and stop the thread. A thread that hangs is abandoned."""
        self.drain()
        await self.wait_idle()
        self._commands.put(Stop())
        await self._stopped.wait()
        if self._watch is not None:
            self._watch.cancel()
        if self.state is not EngineState.DEAD:
            self._set_state(EngineState.STOPPED)

    def check_ready(self) -> None:
        """Raise Draining unless requests and models are accepted."""
        if self.state is not EngineState.READY:
            raise Draining(f"the engine is {self.state.value}", RETRY_WHILE_DRAINING_S)

    def _drop_finished_models(self) -> None:
        # Not in the engine thread: predictions read a model until the event loop knows that all its images have ended
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
            case Advanced(images):
                self._on_advanced(images)
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
        if loading is not None:  # None if the engine died while loading
            self._admission.add_model(model)
            loading.set_result(None)

    def _on_results(self, results: list[ImageResult]) -> None:
        for result in results:
            if result.request_id in self._tickets:  # absent if the engine was declared dead while a step hung
                self._admission.release(result.request_id, result.position)  # first: events predict remaining work
                self._tickets.image_ended(result)
        self._drop_finished_models()

    def _on_advanced(self, images: list[Image]) -> None:
        for image in images:
            if image.request_id in self._tickets:  # absent if the engine was declared dead while a step hung
                self._admission.advance(image)
        self._drop_finished_models()

    async def _watch_for_hangs(self) -> None:
        watchdog = Watchdog()
        while self.state is not EngineState.DEAD:
            if watchdog.hangs(self._engine.under_way, self._engine.clock()):
                log.critical("a step of the engine hangs")
                self._die("a step of the engine hangs")
                self._stopped.set()  # do not wait for a hung thread
            await asyncio.sleep(CHECK_INTERVAL_S)

    def _die(self, message: str) -> None:
        if self.state is EngineState.DEAD:
            return
        self._set_state(EngineState.DEAD)
        with suppress(queue.Empty):
            while True:
                self._commands.get_nowait()
        self._commands.put(Stop())  # the only command that a hung thread carries out if its step returns
        self._admission.release_all()
        self._tickets.fail_all(message)
        for loading in self._loading.values():
            loading.set_exception(EngineDead(message))
        self._loading.clear()

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._reached[state].set()
        self._metrics.ready.set(state is EngineState.READY)
        log.info("engine: %s", state.value)
