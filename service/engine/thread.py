"""EngineThread: the thread that an engine runs in. Commands come in through a queue, reports go to the event loop.

Both are plain dataclasses, carried out and sent in order.
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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enter:
    """Let accepted images wait for their first step."""

    images: list[Image]


@dataclass(frozen=True)
class Abort:
    """Take a request's images out."""

    request_id: str


@dataclass(frozen=True)
class Load:
    """Take in a model."""

    model: str
    runner: Runner
    costs: StepCosts


@dataclass(frozen=True)
class Drop:
    """Forget a model, none of whose images is in flight."""

    model: str


@dataclass(frozen=True)
class Stop:
    """End the thread."""


Command = Enter | Abort | Load | Drop | Stop


@dataclass(frozen=True)
class Warm:
    """The engine has warmed up, and its steps have been timed."""


@dataclass(frozen=True)
class Loaded:
    """The engine has a model."""

    model: str


@dataclass(frozen=True)
class ImagesEnded:
    """Images have ended."""

    results: list[ImageResult]


@dataclass(frozen=True)
class Observed:
    """The mailbox is no longer empty."""


@dataclass(frozen=True)
class Died:
    """The engine stopped with an error."""

    message: str


@dataclass(frozen=True)
class Stopped:
    """The thread ends. The last report."""


Report = Warm | Loaded | ImagesEnded | Observed | Died | Stopped


class EngineThread:
    """All methods run in the engine's thread, and only they call the engine, once `run` has begun.

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
            engine: not in use by any other thread.
            commands: what to do, in order.
            mailbox: takes what steps show of watched images.
            loop: calls `on_report`.
            on_report: is told what happens, in order.
        """
        self._engine = engine
        self._commands = commands
        self._mailbox = mailbox
        self._loop = loop
        self._on_report = on_report

    def run(self) -> None:
        """Warm up, then take steps and carry out commands until `Stop` or an error of the engine."""
        try:
            self._engine.warm_up()
            self._engine.measure()
            self._tell(Warm())
            while self._carry_out_commands():
                self._engine.launch()
                self._report()  # of the step before, while the device takes this one
                self._engine.settle()
        except BaseException as error:  # whatever it is, the requests that wait must learn of it
            log.exception("the engine stopped with an error")
            with suppress(Exception):  # the device may be gone, and what was copied from it
                self._report()  # images that were done before
            self._tell(Died(f"the engine stopped with an error ({type(error).__name__})"))
        finally:
            self._tell(Stopped())

    def _carry_out_commands(self) -> bool:
        """Carry out all commands, and wait for some while the engine has no work; False: stop."""
        while True:
            idle = not self._engine.has_work()
            if idle:
                self._report()  # no step will be launched that this could be done behind
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            match command:
                case Enter(images):
                    self._engine.enter(images)
                case Abort(request_id):
                    self._deliver(self._engine.abort(request_id))
                case Load(model, runner, costs):
                    self._engine.load(model, runner, costs)
                    self._tell(Loaded(model))
                    del command, runner  # while this waits for work, it must not keep weights that have been dropped
                case Drop(model):
                    self._engine.settle_all()  # steps of images that were aborted
                    self._report()
                    self._engine.drop(model)
                case Stop():
                    return False

    def _report(self) -> None:
        """Send what the settled steps did: results, and observations that replace older ones nobody has read."""
        self._deliver(self._engine.report())
        observations = self._engine.observations
        if observations and self._mailbox.put(observations):
            self._tell(Observed())

    def _deliver(self, results: list[ImageResult]) -> None:
        if results:
            self._tell(ImagesEnded(results))

    def _tell(self, report: Report) -> None:
        try:
            self._loop.call_soon_threadsafe(self._on_report, report)
        except RuntimeError:  # the loop is closed
            log.warning("the event loop closed before the engine stopped")
