"""EngineThread: run an engine in its own thread. Commands arrive through a queue; reports go to the event loop.

Both are plain dataclasses and are processed in order.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from service.engine.engine import Engine
from service.engine.mailbox import Mailbox
from service.engine.request import Image, ImageResult
from service.engine.runners.base import Runner
from service.engine.step_costs import StepCosts
from service.errors import ModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enter:
    """Queue accepted images for their first step."""

    images: list[Image]


@dataclass(frozen=True)
class Abort:
    """Remove a request's images."""

    request_id: str


@dataclass(frozen=True)
class Load:
    """Load a model."""

    model: str
    runner: Runner
    costs: StepCosts


@dataclass(frozen=True)
class Drop:
    """Unload a model that has no images in flight."""

    model: str


@dataclass(frozen=True)
class Stop:
    """End the thread."""


Command = Enter | Abort | Load | Drop | Stop


@dataclass(frozen=True)
class Warm:
    """The engine has warmed up and timed its steps."""


@dataclass(frozen=True)
class Loaded:
    """The engine has loaded a model."""

    model: str


@dataclass(frozen=True)
class ImagesEnded:
    """Images have ended."""

    results: list[ImageResult]


@dataclass(frozen=True)
class Advanced:
    """Images have ended a stage, and their next one has begun."""

    images: list[Image]


@dataclass(frozen=True)
class Observed:
    """The mailbox is no longer empty."""


@dataclass(frozen=True)
class Died:
    """The engine stopped with an error."""

    message: str


@dataclass(frozen=True)
class Stopped:
    """The thread ends. This is the last report."""


Report = Warm | Loaded | ImagesEnded | Advanced | Observed | Died | Stopped


class EngineThread:
    """Owns the engine once `run` has started: all methods run in the engine thread, and only they call the engine.

    Other threads may read the engine's `snapshot` and `under_way`.
    """

    def __init__(
        self,
        engine: Engine,
        commands: queue.SimpleQueue[Command],
        mailbox: Mailbox,
        loop: asyncio.AbstractEventLoop,
        on_report: Callable[[Report], None],
    ) -> None:
        """Prepare to run.

        Args:
            engine: an engine that no other thread uses.
            commands: queue of commands, executed in order.
            mailbox: receives the observations of watched images.
            loop: event loop that calls `on_report`.
            on_report: called with each report, in order.
        """
        self._engine = engine
        self._commands = commands
        self._mailbox = mailbox
        self._loop = loop
        self._on_report = on_report

    def run(self) -> None:
        """Warm up, then take steps and execute commands until `Stop` or an engine error."""
        try:
            self._engine.warm_up()
            self._engine.measure()
            self._send(Warm())
            while self._carry_out_commands():
                self._engine.launch()
                self._report()  # the previous step, while the device runs this one
                self._engine.settle()
        except BaseException as error:  # any error must fail the pending requests
            reason = f": {error}" if isinstance(error, ModelError) else ""  # says all that the user can do
            log.error("the engine stopped with an error%s", reason, exc_info=not reason)
            with suppress(Exception):  # the device and pending copies may be lost
                self._report()  # images that completed before the error
            self._send(Died(f"the engine stopped with an error ({type(error).__name__})"))
        finally:
            self._send(Stopped())

    def _carry_out_commands(self) -> bool:
        """Execute all queued commands; block while the engine has no work. Return False on `Stop`."""
        while True:
            idle = not self._engine.has_work()
            if idle:
                self._report()  # there is no next step to overlap this with
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            match command:
                case Enter(images):
                    self._engine.enter(images)
                    del command, images  # do not keep given arrays alive while waiting for work
                case Abort(request_id):
                    self._deliver(self._engine.abort(request_id))
                case Load(model, runner, costs):
                    self._engine.load(model, runner, costs)
                    self._send(Loaded(model))
                    del command, runner  # do not keep dropped weights alive while waiting for work
                case Drop(model):
                    self._settle_all()
                    self._engine.drop(model)
                case Stop():
                    self._settle_all()  # the runner may serve another engine
                    return False

    def _settle_all(self) -> None:
        """Wait for the steps of aborted images, and report them."""
        self._engine.settle_all()
        self._report()

    def _report(self) -> None:
        """Send the results and observations of settled steps; newer observations replace unread ones."""
        self._deliver(self._engine.report())
        if self._engine.advanced:
            self._send(Advanced(self._engine.advanced))
        observations = self._engine.observations
        if observations and self._mailbox.put(observations):
            self._send(Observed())

    def _deliver(self, results: list[ImageResult]) -> None:
        if results:
            self._send(ImagesEnded(results))

    def _send(self, report: Report) -> None:
        try:
            self._loop.call_soon_threadsafe(self._on_report, report)
        except RuntimeError:  # the loop is closed
            log.warning("the event loop closed before the engine stopped")
