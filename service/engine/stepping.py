"""Taking steps: what was launched is under way until it is settled. Two ways, behind one interface.

On a host a step is over when it has been waited for. Whatever raises, at the launch or later, is dealt with when the
step is settled, and the step can be taken again. On a device that answers later, steps are launched upon others that
have not been settled: only a launch can raise what an image is guilty of, and any later error ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from service.backends.base import FailureKind
from service.backends.pending import Pending, Raised
from service.engine.observing import observe
from service.engine.recovery import Attempt, Outcome, take_step
from service.engine.request import Image, ImageStatus, Observation, StepBatch
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler


class Shown(NamedTuple):
    """What is to be shown of a step: copies, asked for before another step is launched upon it."""

    done: Sequence[Image]
    """Images whose pixels were read; some of them may fail later."""
    pixels: Pending[npt.NDArray[np.uint8]] | None
    """Of each of them, uint8 [n, H, W, C]; None where there are none."""
    seen: Pending[list[Observation]]
    """Of watched images."""


class StepEnd(NamedTuple):
    """What became of a step."""

    outcome: Outcome
    left: Sequence[Image]
    """Images that ended with it, in its order."""
    shown: Shown


class LaunchedStep(Protocol):
    """A step under way."""

    batch: StepBatch
    begun: float
    """When it was launched, on the engine's clock."""
    number: int
    """How many steps its model has taken, this one among them."""
    left: Sequence[Image]
    """Images that end with it, in its order, as far as is known."""

    def settle(self) -> StepEnd:
        """Wait for it, and take out those of its images that failed. Called once.

        Raises:
            Exception: the device, or the network, is not to be trusted any more.
        """
        ...


@dataclass(frozen=True, eq=False)
class StepTaker:
    """Takes the steps of one model: what both ways have in common."""

    runner: Runner
    scheduler: Scheduler
    attempted: Callable[[StepBatch], None]
    """Called after every launch, also of a part of a batch, and of one that raised."""
    expect: Callable[[StepBatch], None]
    """Called before whatever is taken again."""
    failed: Callable[[FailureKind, StepBatch], None]
    """Called with every attempt that raised."""

    @property
    def depth(self) -> int:
        """Steps that may be under way when the next one is launched."""
        return self.runner.depth

    def launch(self, batch: StepBatch, begun: float) -> LaunchedStep:
        """Begin a step and write it back in the scheduler; `begun` is the time by the engine's clock.

        Raises:
            Exception: the device, or the network, is not to be trusted any more.
        """
        return QueuedStep(self, batch, begun) if self.depth else HostStep(self, batch, begun)

    def begin(self, part: StepBatch) -> Pending[list[bool]]:
        """Begin a step of all or some images of a batch, setting those up that it is the first step of."""
        try:
            self.runner.start([step for step in part.steps if step.step == 0])
            return self.runner.launch(part.steps)
        finally:
            self.attempted(part)

    def take(self, batch: StepBatch, attempt: Attempt) -> Outcome:
        """Take a step, again and in parts where it raises."""
        return take_step(batch.images, attempt, self.runner, lambda kind, images: self.failed(kind, batch.part(images)))

    def fail(self, batch: StepBatch, left: Sequence[Image], failed: Iterable[Image]) -> Sequence[Image]:
        """Tell the scheduler which images have failed; returns those that leave with them and `left`."""
        leaving = {*left, *(image for image in failed if self.scheduler.fail(image))}
        return [image for image in batch.images if image in leaving]

    def show(self, batch: StepBatch, left: Sequence[Image]) -> Shown:
        """Copy what is to be shown of a step."""
        done = [image for image in left if image.status is ImageStatus.DONE]
        pixels = self.runner.read([image.slot for image in done if image.slot is not None]) if done else None
        return Shown(done, pixels, observe(batch.images, self.runner))


class HostStep:
    """Implements `LaunchedStep`, where a step is over when it has been waited for."""

    def __init__(self, taker: StepTaker, batch: StepBatch, begun: float) -> None:
        self._taker = taker
        self._first: list[Pending[list[bool]]] = []  # emptied: kept, it would keep what was being computed
        try:
            self._first.append(taker.begin(batch))
        except Exception as error:
            self._first.append(Raised(error))
        self.batch = batch
        self.begun = begun
        self.left: Sequence[Image] = taker.scheduler.complete(batch, [True] * len(batch.images))
        self.number = taker.scheduler.steps(batch.model)

    def settle(self) -> StepEnd:
        """Wait for the first attempt; make others where it raises."""
        taker, batch, left = self._taker, self.batch, self.left
        outcome = taker.take(batch, self._attempt)
        if not all(outcome.ok):
            failed = [image for image, ok in zip(batch.images, outcome.ok, strict=True) if not ok]
            left = taker.fail(batch, left, failed)
        return StepEnd(outcome, left, taker.show(batch, left))

    def _attempt(self, images: Sequence[Image]) -> list[bool]:
        if self._first:
            return self._first.pop().wait()
        part = self.batch.part(images)
        self._taker.expect(part)
        return self._taker.begin(part).wait()


class QueuedStep:
    """Implements `LaunchedStep`, where others may be launched upon it before it is settled."""

    def __init__(self, taker: StepTaker, batch: StepBatch, begun: float) -> None:
        self._taker = taker
        self._flags: list[tuple[Sequence[Image], Pending[list[bool]]]] = []
        """Of the images of each launch, whether they are still finite."""
        self.batch = batch
        self.begun = begun
        self._outcome = taker.take(batch, self._attempt)
        self.left: Sequence[Image] = taker.scheduler.complete(batch, self._outcome.ok)
        self.number = taker.scheduler.steps(batch.model)
        self._shown = taker.show(batch, self.left)

    def settle(self) -> StepEnd:
        """Wait for the flags: what a launch raised has been dealt with."""
        flags = [zip(images, pending.wait(), strict=True) for images, pending in self._flags]
        failed = [image for part in flags for image, ok in part if not ok]
        left = self._taker.fail(self.batch, self.left, failed) if failed else self.left
        return StepEnd(self._outcome, left, self._shown)

    def _attempt(self, images: Sequence[Image]) -> list[bool]:
        self._flags.append((images, self._taker.begin(self.batch.part(images))))
        return [True] * len(images)
