"""Take steps: `launch` starts a step, `settle` completes it. Two implementations of one interface.

`HostStep`: the step is complete when it has been waited for. Errors at launch or later are handled when the step is
settled, and the step can be repeated. `QueuedStep`, for devices that execute work asynchronously: further steps are
launched before earlier ones are settled. Only a launch can raise errors caused by an image; any later error is fatal
to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from service.backends.base import FailureKind
from service.backends.pending import Later, Pending, Raised
from service.engine.observing import observe
from service.engine.recovery import Attempt, Outcome, take_step
from service.engine.request import Image, ImageStatus, Observation, StepBatch
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler


class Shown(NamedTuple):
    """Output of a step: copies, requested before another step is launched after it."""

    done: Sequence[Image]
    """Images whose pixels were read; some of them may fail later."""
    outputs: Pending[Iterable[npt.NDArray[Any]]] | None
    """Pixels [H, W, C] or values [C, H, W] of each of the `done` images; None if there are none."""
    seen: Pending[list[Observation]]
    """Observations of watched images."""


class StepEnd(NamedTuple):
    """Result of a settled step."""

    outcome: Outcome
    left: Sequence[Image]
    """Images that ended with the step, in its order."""
    shown: Shown


class LaunchedStep(Protocol):
    """A step under way."""

    batch: StepBatch
    begun: float
    """Launch time on the engine's clock."""
    number: int
    """Number of steps that its model has taken, including this one."""
    left: Sequence[Image]
    """Images known so far to end with the step, in its order."""

    def settle(self) -> StepEnd:
        """Wait for the step and remove its failed images. Call it once.

        Raises:
            Exception: the device or the network can no longer be trusted.
        """
        ...


@dataclass(frozen=True, eq=False)
class StepTaker:
    """Takes the steps of one model: the code that both implementations share."""

    runner: Runner
    scheduler: Scheduler
    attempted: Callable[[StepBatch], None]
    """Called after every launch, including launches of a part of a batch and launches that raised."""
    expect: Callable[[StepBatch], None]
    """Called before a step or a part of it is repeated."""
    failed: Callable[[FailureKind, StepBatch], None]
    """Called with every attempt that raised."""

    @property
    def depth(self) -> int:
        """Return the number of steps that may be under way when the next one is launched."""
        return self.runner.depth

    def launch(self, batch: StepBatch, begun: float) -> LaunchedStep:
        """Start a step and record it in the scheduler; `begun` is the launch time on the engine's clock.

        Raises:
            Exception: the device or the network can no longer be trusted.
        """
        return QueuedStep(self, batch, begun) if self.depth else HostStep(self, batch, begun)

    def begin(self, part: StepBatch) -> Pending[list[bool]]:
        """Start a step of all or some images of a batch; initialize the images that take their first step."""
        try:
            self.runner.start([step for step in part.steps if step.step == 0])
            return self.runner.launch(part.steps)
        finally:
            self.attempted(part)

    def take(self, batch: StepBatch, attempt: Attempt) -> Outcome:
        """Take a step; repeat it, in parts, if it raises."""
        return take_step(batch.images, attempt, self.runner, lambda kind, images: self.failed(kind, batch.part(images)))

    def fail(self, batch: StepBatch, left: Sequence[Image], failed: Iterable[Image]) -> Sequence[Image]:
        """Report failed images to the scheduler. Return the images that leave: `left` and those that failed."""
        leaving = {*left, *(image for image in failed if self.scheduler.fail(image))}
        return [image for image in batch.images if image in leaving]

    def show(self, batch: StepBatch, left: Sequence[Image]) -> Shown:
        """Start copying the output of a step: pixels of done images and observations of watched ones."""
        done = [image for image in left if image.status is ImageStatus.DONE]
        return Shown(done, self._read(done) if done else None, observe(batch.images, self.runner))

    def _read(self, done: Sequence[Image]) -> Pending[Iterable[npt.NDArray[Any]]]:
        """Start copying the outputs of done images."""
        runner = self.runner
        slots = [image.slot for image in done if image.slot is not None]
        if all(image.params.output == "pixels" for image in done):
            return runner.read(slots)
        # One copy per image: requests for values are few
        outputs: list[Pending[npt.NDArray[Any]]] = [
            runner.read([slot])
            if image.params.output == "pixels"
            else runner.read_values([slot], both=image.params.plan.kind == "denoise")
            for image, slot in zip(done, slots, strict=True)
        ]
        return Later(lambda: [output.wait()[0] for output in outputs])


class HostStep:
    """A `LaunchedStep` that is complete when it has been waited for."""

    def __init__(self, taker: StepTaker, batch: StepBatch, begun: float) -> None:
        self._taker = taker
        self._first: list[Pending[list[bool]]] = []  # emptied on use, to free intermediate results
        try:
            self._first.append(taker.begin(batch))
        except Exception as error:
            self._first.append(Raised(error))
        self.batch = batch
        self.begun = begun
        self.left: Sequence[Image] = taker.scheduler.complete(batch, [True] * len(batch.images))
        self.number = taker.scheduler.steps(batch.model)

    def settle(self) -> StepEnd:
        """Wait for the first attempt; make further attempts if it raises."""
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
    """A `LaunchedStep` that allows further launches before it is settled."""

    def __init__(self, taker: StepTaker, batch: StepBatch, begun: float) -> None:
        self._taker = taker
        self._flags: list[tuple[Sequence[Image], Pending[list[bool]]]] = []
        """The images of each launch, with flags that tell whether they are still finite."""
        self.batch = batch
        self.begun = begun
        self._outcome = taker.take(batch, self._attempt)
        self.left: Sequence[Image] = taker.scheduler.complete(batch, self._outcome.ok)
        self.number = taker.scheduler.steps(batch.model)
        self._shown = taker.show(batch, self.left)

    def settle(self) -> StepEnd:
        """Wait for the flags. Errors of a launch have already been handled."""
        flags = [zip(images, pending.wait(), strict=True) for images, pending in self._flags]
        failed = [image for part in flags for image, ok in part if not ok]
        left = self._taker.fail(self.batch, self.left, failed) if failed else self.left
        return StepEnd(self._outcome, left, self._shown)

    def _attempt(self, images: Sequence[Image]) -> list[bool]:
        self._flags.append((images, self._taker.begin(self.batch.part(images))))
        return [True] * len(images)
