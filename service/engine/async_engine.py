"""AsyncEngine: the engine in a thread of its own, reached from asyncio. It refuses, cancels, drains and reports.

Commands go to the thread through a queue, results come back through `call_soon_threadsafe`; what crosses is plain
dataclasses. Whatever ends the thread ends every waiting request with it, and so does a step that hangs: nobody waits
for ever.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.event_stream import EventStream
from service.engine.forecast import Forecast, Prediction
from service.engine.ledger import Ledger
from service.engine.mailbox import Mailbox
from service.engine.model_ids import name_of
from service.engine.order import ServiceOrder
from service.engine.request import (
    FailureReason,
    GenerationRequest,
    Image,
    ImageResult,
    ImageStatus,
    Observation,
    Priority,
)
from service.engine.runners.base import Runner
from service.engine.step_costs import StepCosts
from service.engine.watchdog import LOOK_EVERY_S, Watchdog
from service.errors import (
    Aborted,
    ClientLimit,
    DeadlineUnmeetable,
    Draining,
    EngineDead,
    GenerationFailed,
    ImageFailed,
    InvalidRequest,
    NotFinite,
    QueueFull,
    UnknownModel,
)
from service.metrics import Metrics

log = logging.getLogger(__name__)

RETRY_WHILE_DRAINING_S = 10.0
"""Told to clients of a replica that is not ready: another one will answer sooner, this address perhaps later."""


class EngineState(enum.Enum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(frozen=True)
class _Enter:
    images: list[Image]


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Load:
    model: str
    runner: Runner
    costs: StepCosts


@dataclass(frozen=True)
class _Drop:
    model: str


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass
class Ticket:
    """An accepted request: one future per image, in order."""

    request: GenerationRequest
    images: list[asyncio.Future[ImageResult]]
    submitted_at: float
    """time.monotonic() at admission."""
    prediction: Prediction
    """Made at admission; `AsyncEngine.eta` has a newer one."""
    events: EventStream | None
    """For one reader; None where the request has no `watch`."""
    ended: asyncio.Future[None]
    """Done when the engine has let go of every image, later than `images` where they were given up."""
    outcomes: list[ImageResult] = field(init=False, default_factory=list)
    """What the engine said of each image that left it, of failed and aborted ones too."""


class AsyncEngine:
    """Owns the engine's thread. Its methods belong to the event loop that started it."""

    def __init__(
        self,
        engine: Engine,
        config: EngineConfig,
        metrics: Metrics,
        on_state: Callable[[EngineState], None] | None = None,
    ) -> None:
        self.state = EngineState.STARTING
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._on_state = on_state
        self._commands: queue.SimpleQueue[_Enter | _Abort | _Load | _Drop | _Stop] = queue.SimpleQueue()
        self._mailbox = Mailbox()
        self._tickets: dict[str, Ticket] = {}
        self.ledger = Ledger(engine.costs)
        """Accepted work; to be read only."""
        self._order = ServiceOrder(config)
        self._forecast = Forecast(config, self.ledger)
        self._models = set(engine.costs)
        """Those that requests may be for."""
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._retiring: set[str] = set()
        """Those that only go on until their last image is done."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = asyncio.Event()
        self.died = asyncio.Event()
        """Set when the engine has stopped with an error, or hangs."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the thread: it warms up, then turns the state to READY."""
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._watch_for_hangs())
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Accept a request, or refuse it before any work is done.

        Raises:
            InvalidRequest: more images than could ever be in flight.
            QueueFull: too many rows are in flight, or the predicted wait is too long.
            ClientLimit: too many of them are this client's.
            DeadlineUnmeetable: it would not be done in time.
            Draining: starting up, shutting down, or stopped with an error.
            UnknownModel: no such model, or not any more.
        """
        self._check_ready()
        if request.model not in self._models:
            raise UnknownModel(name_of(request.model), sorted({name_of(model) for model in self._models}))
        self._check_room(request)
        now = time.monotonic()
        snapshot = self._engine.snapshot
        images = self._order.images_of(request, now, snapshot.steps[request.model])
        prediction = self._forecast.predict(images, snapshot)
        self._check_prediction(request, prediction)

        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[ImageResult]] = [loop.create_future() for _ in images]
        events = None
        if request.watch is not None:
            events = EventStream(len(images), prediction, lambda: self.eta(request.request_id))
        ticket = Ticket(request, futures, now, prediction, events, loop.create_future())
        self._tickets[request.request_id] = ticket
        self.ledger.add(images)
        self._metrics.predicted_wait_seconds.observe(prediction.wait_s)
        self._idle.clear()
        self._commands.put(_Enter(images))
        return ticket

    @property
    def models_held(self) -> int:
        """Models in memory: those that requests may be for, and those whose last images are being made."""
        return len(self._models) + len(self._retiring)

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
        self._commands.put(_Load(model, runner, costs))
        await asyncio.shield(loaded)

    def retire(self, model: str) -> None:
        """Accept no more requests for a model; its weights go with the last of its images."""
        self._models.remove(model)
        self._retiring.add(model)
        self._drop_if_done(model)

    def _drop_if_done(self, model: str) -> None:
        # Here and not in the engine's thread: predictions look at models until the loop knows that all images are done
        if model in self._retiring and not self.ledger.models[model].rows:
            self._retiring.remove(model)
            self.ledger.remove_model(model)
            self._commands.put(_Drop(model))

    def _check_ready(self) -> None:
        if self.state is not EngineState.READY:
            raise Draining(f"the engine is {self.state.value}", RETRY_WHILE_DRAINING_S)

    def _check_room(self, request: GenerationRequest) -> None:
        """Refuse by rows: what is in flight in all, and of this client."""
        self._check_client_images(request)
        rows, limit = request.rows, self._config.max_in_flight
        in_flight = self.ledger.rows
        if rows > limit:
            count = limit * len(request.images) // rows
            raise InvalidRequest(
                "n", f"must be at most {count}, the images this service can hold; got {len(request.images)}"
            )
        if in_flight + rows > limit:
            raise QueueFull(
                f"{in_flight} rows are in flight, at most {limit} can be; this request has {rows}",
                self._until_free_s(in_flight + rows - limit),
            )
        own, part = self.ledger.client(request.client).rows, int(limit * self._config.client_share)
        if request.client and own and own + rows > part:  # whoever has nothing in flight is never refused here
            raise ClientLimit(
                f"{own} rows of this client are in flight, at most {part} can be; this request has {rows}",
                self._until_free_s(own + rows - part),
            )

    def _check_client_images(self, request: GenerationRequest) -> None:
        """Refuse by the limit that a client brings along."""
        limit, count = request.max_client_images, len(request.images)
        if limit is None:
            return
        if count > limit:
            raise InvalidRequest(
                "n", f"must be at most {limit}, the images this client may have in flight; got {count}"
            )
        in_flight = self.ledger.client(request.client).images
        if in_flight + count > limit:
            raise ClientLimit(
                f"{in_flight} images of this client are in flight, at most {limit} can be; this request has {count}",
                self._until_free_s((in_flight + count - limit) * request.rows // count),
            )

    def _check_prediction(self, request: GenerationRequest, prediction: Prediction) -> None:
        """Refuse by predicted time: waits that are too long, and deadlines that cannot be met."""
        too_long = prediction.wait_s - self._config.max_wait_s
        if too_long > 0 and request.priority is Priority.INTERACTIVE:
            raise QueueFull(
                f"the predicted wait is {prediction.wait_s:.3g} s, at most {self._config.max_wait_s:.3g} s can be",
                max(1.0, too_long),
            )
        if request.deadline_s is not None and prediction.finish_s > request.deadline_s:
            raise DeadlineUnmeetable(request.deadline_s, prediction.finish_s)

    def _until_free_s(self, rows: int) -> float:
        """Predict when so many of the rows in flight will have left, taking all to be alike; at least a second."""
        return max(1.0, self._forecast.backlog_s(self._engine.snapshot) * rows / max(rows, self.ledger.rows))

    def abort(self, request_id: str) -> None:
        """Free a request's rows at the next step; its unfinished images end with `Aborted`, its events end here."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._commands.put(_Abort(request_id))
            if ticket.events is not None:
                ticket.events.close()

    def eta(self, request_id: str) -> Prediction | None:
        """Say how many images come before a request's and when it will be done; None: it is, or was never accepted."""
        ticket = self._tickets.get(request_id)
        return None if ticket is None else self._forecast.eta(request_id, self._engine.snapshot)

    def drain(self) -> None:
        """Refuse new requests from now on; accepted ones go on."""
        if self.state in (EngineState.STARTING, EngineState.READY):
            self._set_state(EngineState.DRAINING)

    async def stop(self) -> None:
        """Drain, wait for accepted requests, end the thread; one that hangs is left behind."""
        self.drain()
        await self._idle.wait()
        self._commands.put(_Stop())
        await self._ended.wait()
        if self._watch is not None:
            self._watch.cancel()
        if self.state is not EngineState.DEAD:
            self._set_state(EngineState.STOPPED)

    async def wait_idle(self) -> None:
        """Wait until no accepted request is unfinished."""
        await self._idle.wait()

    # In the engine's thread

    def _run(self) -> None:
        try:
            self._engine.warm_up()
            self._engine.measure()
            self._tell(self._on_warm)
            while self._take_commands():
                self._engine.launch()
                self._report()  # of the step before, while the device takes this one
                self._engine.settle()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            log.exception("the engine stopped with an error")
            with suppress(Exception):  # the device may be gone, and what was copied from it
                self._report()  # images that were done before
            message = f"the engine stopped with an error ({type(error).__name__})"
            self._tell(lambda: self._on_death(message))
        finally:
            self._tell(self._ended.set)

    def _take_commands(self) -> bool:
        """Carry out what was asked for, waiting for something to do; False: stop."""
        while self.state is not EngineState.DEAD:
            idle = not self._engine.has_work()
            if idle:
                self._report()  # no step will be launched that this could be done behind
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            match command:
                case _Enter(images):
                    self._engine.enter(images)
                case _Abort(request_id):
                    self._deliver(self._engine.abort(request_id))
                case _Load(model, runner, costs):
                    self._engine.load(model, runner, costs)
                    self._tell(partial(self._on_loaded, model))
                    del command, runner  # while this waits for work, it must not keep weights that have been dropped
                case _Drop(model):
                    self._engine.settle_all()  # steps of images that were aborted
                    self._report()
                    self._engine.drop(model)
                case _Stop():
                    return False
        return False

    def _report(self) -> None:
        self._deliver(self._engine.report())
        self._show(self._engine.observations)

    def _deliver(self, results: list[ImageResult]) -> None:
        if results:
            self._tell(lambda: self._on_results(results))

    def _show(self, observations: list[Observation]) -> None:
        """Leave what a step showed, however busy the event loop is: at most one call of this kind waits there."""
        if observations and self._mailbox.put(observations):
            self._tell(self._on_observations)

    def _tell(self, callback: Callable[[], None]) -> None:
        if self._loop is None:
            raise RuntimeError("the engine's thread runs without an event loop")
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            log.warning("the event loop closed before the engine stopped")

    # In the event loop

    async def _watch_for_hangs(self) -> None:
        watchdog = Watchdog()
        while self.state is not EngineState.DEAD:
            if watchdog.hangs(self._engine.under_way, self._engine.clock()):
                log.critical("a step of the engine hangs")
                self._on_death("a step of the engine hangs")
                self._ended.set()  # whatever becomes of the thread, nobody waits for it
            await asyncio.sleep(LOOK_EVERY_S)

    def _on_warm(self) -> None:
        if self.state is EngineState.STARTING:
            self._set_state(EngineState.READY)

    def _on_loaded(self, model: str) -> None:
        loading = self._loading.pop(model, None)
        if loading is not None:  # else the engine has died meanwhile
            self._models.add(model)
            self.ledger.add_model(model)
            loading.set_result(None)

    def _on_observations(self) -> None:
        for seen in self._mailbox.take():
            ticket = self._tickets.get(seen.request_id)
            if ticket is not None and ticket.events is not None and not ticket.images[seen.position].done():
                ticket.events.observe(seen)

    def _on_results(self, results: list[ImageResult]) -> None:
        for result in results:
            ticket = self._tickets.get(result.request_id)
            if ticket is None:
                continue
            ticket.outcomes.append(result)
            params = ticket.request.images[result.position]
            self.ledger.remove(result.request_id, result.position)  # first: events tell when the rest will be done
            if result.status is ImageStatus.DONE:
                self._metrics.image_done(name_of(ticket.request.model), result.queue_s, result.compute_s)
                self._metrics.deadline_misses.inc(result.late_s > 0)
                _resolve(ticket, result.position, result)
            elif result.failure is not None:
                self._metrics.model_images.labels(name_of(ticket.request.model), "failed").inc()
                _resolve(ticket, result.position, image_failure(params.image_index, result.failure))
            else:
                _resolve(ticket, result.position, Aborted("the request was cancelled"))
            if len(ticket.outcomes) == len(ticket.images):
                self._end(ticket)
        if not self._tickets:
            self._idle.set()

    def _end(self, ticket: Ticket) -> None:
        """Forget a request that has ended, and note how true its prediction was if it came to all its pictures."""
        request = ticket.request
        ticket.ended.set_result(None)
        del self._tickets[request.request_id]
        self._drop_if_done(request.model)
        complete = all(future.done() and not future.cancelled() and not future.exception() for future in ticket.images)
        if complete and ticket.prediction.finish_s > 0:
            took = time.monotonic() - ticket.submitted_at
            self._metrics.finish_over_predicted.observe(took / ticket.prediction.finish_s)

    def _on_death(self, message: str) -> None:
        if self.state is EngineState.DEAD:
            return
        self._set_state(EngineState.DEAD)
        for ticket in self._tickets.values():
            for position in range(len(ticket.images)):
                _resolve(ticket, position, EngineDead(message))
            ticket.ended.set_result(None)
        self._tickets.clear()
        for loading in self._loading.values():
            loading.set_exception(EngineDead(message))
        self._loading.clear()
        self._idle.set()
        self.died.set()

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._metrics.ready.set(state is EngineState.READY)
        if self._on_state is not None:
            self._on_state(state)


def _resolve(ticket: Ticket, position: int, outcome: ImageResult | GenerationFailed) -> None:
    future = ticket.images[position]
    if future.done():
        return
    if ticket.events is not None:
        ticket.events.image_ended(position, outcome)
    if isinstance(outcome, ImageResult):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
        future.exception()  # read once: a client that went away leaves nobody to retrieve it


def image_failure(image_index: int, reason: FailureReason) -> GenerationFailed:
    """Return the error that tells why an image failed."""
    if reason == "not_finite":
        return NotFinite(f"image {image_index}: its numbers overflowed while sampling")
    if reason == "out_of_memory":
        return ImageFailed(f"image {image_index}: it does not fit the memory that is left, not even alone")
    return ImageFailed(f"image {image_index}: the network failed on it, also alone; the log has the details")
