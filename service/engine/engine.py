"""Engine: one step at a time, launch -> settle -> report. Deterministic; threads live elsewhere.

The device waits for as little as possible. `launch` picks images and begins their step; who leaves with it is known
then. `settle` waits for it, and takes out those that failed; then the next step can be launched. A runner whose device
takes work in order may have more steps under way: that an image failed is then learnt of later. `report` does what
nothing waits for: it counts, and makes results of those who left. Call it behind the launch of the next step, or at
once where there is none.

A step that raises is taken again without the images that make it raise (`service.engine.recovery`). An error that
`step` itself raises is the engine's end.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from service.backends.base import FailureKind
from service.backends.pending import Pending, Raised
from service.engine.config import EngineConfig
from service.engine.counting import EngineCounts
from service.engine.model_ids import name_of
from service.engine.observing import observe
from service.engine.recovery import Attempt, MemoryLimit, Outcome, take_step
from service.engine.request import (
    FailureReason,
    GenerationRequest,
    Image,
    ImageResult,
    ImageStatus,
    Observation,
    StepBatch,
)
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts, knee
from service.engine.timing import observe_step, time_steps
from service.engine.watchdog import StepUnderWay
from service.metrics import Metrics

WIDTH_INTERVAL = 64
"""Steps between two looks at the width; costs are running means over more."""


@dataclass(eq=False)
class _Step:
    """A step from its launch to its report."""

    batch: StepBatch
    begun: float
    launched: list[tuple[Sequence[Image], Pending[list[bool]]]]
    """What is to be waited for: the step of all its images, or of parts of them."""
    outcome: Outcome
    """What is known of its images; that all is well, until it settles."""
    left: list[Image]
    """Images that end with it, in its order."""
    number: int
    """How many steps its model has taken, this one among them."""
    done: list[Image] = field(default_factory=list)
    """Those of them that pixels were read of, some of which may have failed since."""
    pixels: Pending[npt.NDArray[np.uint8]] | None = None
    seen: Pending[list[Observation]] = field(init=False)
    """What it shows of watched images."""
    ended: float = field(init=False)
    seconds: float = field(init=False)
    """What it took: from its launch, or from the end of the step before where that came later."""
    is_timed: bool = field(init=False)
    """Whether that is so: of steps that settle in one go, the later ones ended nobody knows when."""


class Engine:
    """One device, its scheduler, and a runner per model."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        config: EngineConfig,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = Scheduler(config, runners)
        self.costs = {model: StepCosts() for model in runners}
        """What a step of each model takes, by padded rows."""
        self.under_way: StepUnderWay | None = None
        """The step being taken: another thread may look, to tell one that hangs."""
        self.observations: list[Observation] = []
        """What the steps of the last report showed of watched images."""
        self.clock = clock
        self._config = config
        self._runners = dict(runners)
        self._counts = EngineCounts(metrics)
        self._memory = {model: MemoryLimit(config.max_rows) for model in runners}
        self._saved: dict[Image, object] = {}
        """States of evicted images, in host memory."""
        self._launched: deque[_Step] = deque()
        """Steps under way, the oldest first."""
        self._settled: list[_Step] = []
        """Steps that are to be reported."""
        self._ended = -math.inf
        """When the last step did."""
        self.snapshot: Snapshot
        """The engine as it was last published: another thread may look."""
        self.publish()

    def warm_up(self) -> None:
        """Warm every runner up."""
        for runner in self._runners.values():
            runner.warm_up()

    def measure(self) -> None:
        """Time steps of every batch size, and choose each model's width by them. Only while nothing is in flight.

        Raises:
            RuntimeError: something is in flight, whose slots this would overwrite.
        """
        if self.has_work():
            raise RuntimeError("steps can be timed only while nothing is in flight")
        for model, runner in self._runners.items():
            self.costs[model] = time_steps(runner, self._config, self.clock)
            self._choose_width(model)
        self.publish()

    def load(self, model: str, runner: Runner, costs: StepCosts) -> None:
        """Take in a model between two steps; whoever made its runner has warmed it up, and timed it."""
        self._memory[model] = MemoryLimit(self._config.max_rows)
        self.costs[model] = costs
        self._runners[model] = runner
        self.scheduler.add_model(model)
        self._choose_width(model)
        self.publish()

    def drop(self, model: str) -> None:
        """Forget a model, which frees its weights.

        Raises:
            RuntimeError: some of its images are in flight, or steps under way, or unreported.
        """
        if any(step.batch.model == model for step in (*self._launched, *self._settled)):
            raise RuntimeError(f"model {model} has steps that were not reported")
        self.scheduler.remove_model(model)
        del self._runners[model], self._memory[model], self.costs[model]
        self.publish()
        if all(name_of(other) != name_of(model) for other in self._runners):
            self._counts.model_gone(model)

    def publish(self) -> None:
        """Replace the snapshot with what is true now."""
        leaving = [image for step in (*self._launched, *self._settled) for image in step.left]
        scheduler = self.scheduler
        self.snapshot = Snapshot.of(
            images=(*scheduler.started(), *leaving),
            steps=scheduler.all_steps(),
            widths=scheduler.all_widths(),
            costs={model: costs.now for model, costs in self.costs.items()},
        )

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Accept a request, which has passed no admission."""
        self.enter(self.scheduler.order.images_of(request, submitted_at, self.scheduler.steps(request.model)))

    def enter(self, images: Sequence[Image]) -> None:
        """Let accepted images wait for their first step."""
        self.scheduler.add(images)
        self._counts.in_flight(self.scheduler)

    def abort(self, request_id: str) -> list[ImageResult]:
        """Take a request out; its rows are free at the next step."""
        aborted = self.scheduler.abort(request_id)
        self._forget(aborted)
        self._counts.in_flight(self.scheduler)
        self.publish()
        return [self._result(image, self.clock()) for image in aborted]

    def has_work(self) -> bool:
        """Say whether any image is in flight, or any step under way."""
        return self.scheduler.has_work() or bool(self._launched)

    def step(self) -> list[ImageResult]:
        """Launch, settle and report a step: for those who have nothing to do meanwhile.

        Raises:
            Exception: as `launch`, `settle` and `report`.
        """
        self.launch()
        self.settle()
        return self.report()

    def launch(self) -> None:
        """Pick images and begin their next step; nothing, where none is in flight.

        Raises:
            Exception: the device is not to be trusted any more. Nothing can be done with the engine after that but to
                tell everybody who waits.
        """
        begun = self.clock()
        batch = self.scheduler.schedule(begun)
        if batch is None:
            return
        try:
            self._launch(batch, begun)
        except BaseException:
            self.under_way = None
            raise

    def _launch(self, batch: StepBatch, begun: float) -> None:
        runner = self._runners[batch.model]
        if not self._launched:
            self._expect(batch, batch.images)
        self._move(batch, runner)
        launched: list[tuple[Sequence[Image], Pending[list[bool]]]] = []
        outcome = Outcome([True] * len(batch.images))
        if runner.depth:  # only a launch can raise what an image is guilty of

            def attempt(images: Sequence[Image]) -> list[bool]:
                launched.append((images, self._attempt(batch, images)))
                return [True] * len(images)

            outcome = self._take(batch, attempt)
        else:
            try:
                launched.append((batch.images, self._attempt(batch, batch.images)))
            except Exception as error:  # what it means, and what to do, is said where the step is waited for
                launched.append((batch.images, Raised(error)))
        left = self.scheduler.complete(batch, outcome.ok)
        step = _Step(batch, begun, launched, outcome, left, self.scheduler.steps(batch.model))
        if runner.depth:
            self._look(step)
        self._launched.append(step)
        self.publish()

    def settle(self) -> None:
        """Wait until no more steps are under way than may be, and for one at least where no other can be launched.

        Raises:
            Exception: the device, or the network, is not to be trusted any more, as for `launch`.
        """
        if not self._launched:
            return
        depth = self._runners[self._launched[-1].batch.model].depth
        most = depth if self.scheduler.has_work() else min(depth, len(self._launched) - 1)
        self._settle_down_to(most)

    def settle_all(self) -> None:
        """Wait for every step under way; raises as `settle`."""
        self._settle_down_to(0)

    def _settle_down_to(self, most: int) -> None:
        is_first = True
        while len(self._launched) > most:
            self._settle_oldest(is_first)
            is_first = False

    def _settle_oldest(self, is_timed: bool) -> None:
        """Wait for a step, and take those out that failed."""
        step = self._launched[0]
        runner = self._runners[step.batch.model]
        try:
            failed = self._wait_deep(step) if runner.depth else self._wait(step)
        finally:
            self.under_way = None
        if failed:
            leaving = {*step.left, *(image for image in failed if self.scheduler.fail(image))}
            step.left = [image for image in step.batch.images if image in leaving]
        if not runner.depth:
            self._look(step)
        step.ended = self.clock()
        step.seconds = step.ended - max(step.begun, self._ended)
        step.is_timed = is_timed
        self._ended = step.ended
        self._settled.append(self._launched.popleft())
        if self._launched:
            batch = self._launched[0].batch
            self._expect(batch, batch.images)

    def _wait(self, step: _Step) -> list[Image]:
        """Wait for a step that may be taken again, whatever it raises; returns the images that failed."""
        batch = step.batch

        def attempt(images: Sequence[Image]) -> list[bool]:
            if step.launched:
                return step.launched.pop()[1].wait()
            self._expect(batch, images)
            return self._attempt(batch, images).wait()

        step.outcome = self._take(batch, attempt)
        return [image for image, ok in zip(batch.images, step.outcome.ok, strict=True) if not ok]

    @staticmethod
    def _wait_deep(step: _Step) -> list[Image]:
        """Wait for a step that others were launched upon: what it raises is the device's end."""
        flags = [zip(images, pending.wait(), strict=True) for images, pending in step.launched]
        return [image for part in flags for image, ok in part if not ok]

    def _take(self, batch: StepBatch, attempt: Attempt) -> Outcome:
        runner = self._runners[batch.model]
        return take_step(batch.images, attempt, runner, lambda kind, images: self._on_failure(batch, kind, images))

    def _look(self, step: _Step) -> None:
        """Copy what is to be shown of a step before another one is launched."""
        runner = self._runners[step.batch.model]
        step.done = [image for image in step.left if image.status is ImageStatus.DONE]
        if step.done:
            step.pixels = runner.read([image.slot for image in step.done if image.slot is not None])
        step.seen = observe(step.batch.images, runner)

    def report(self) -> list[ImageResult]:
        """Count what the settled steps did; returns the images that left with them.

        Raises:
            Exception: as `launch`.
        """
        settled = self._settled
        self.observations = [seen for step in settled for seen in step.seen.wait()]
        results = [result for step in settled for result in self._report(step)]
        self._settled = []
        return results

    def _report(self, step: _Step) -> list[ImageResult]:
        pixels = {} if step.pixels is None else dict(zip(step.done, step.pixels.wait(), strict=True))
        self._forget(step.left, step.outcome.failures)
        self._learn(step)
        results = [self._result(i, step.ended, pixels.get(i), _reason(i, step.outcome)) for i in step.left]
        self._counts.failed(results)
        return results

    def _attempt(self, batch: StepBatch, images: Sequence[Image]) -> Pending[list[bool]]:
        """Begin a step of some images of its batch, setting those up that it is the first step of."""
        runner = self._runners[batch.model]
        taking = set(images)
        steps = [step for image, step in zip(batch.images, batch.steps, strict=True) if image in taking]
        try:
            runner.start([step for step in steps if step.step == 0])
            return runner.launch(steps)
        finally:
            self._counts.attempt(batch.model, runner, *batch.rows_of(images))

    def _expect(self, batch: StepBatch, images: Sequence[Image]) -> None:
        """Say what is under way, and how long it should take."""
        rows, classified = batch.rows_of(images)
        padded = self._runners[batch.model].padded_rows(rows)
        self.under_way = StepUnderWay(expected_s=self.costs[batch.model].seconds(padded, classified))

    def _move(self, batch: StepBatch, runner: Runner) -> None:
        """Copy images out of their slots, then others back into slots."""
        if batch.evictions:
            states = runner.evict([move.slot for move in batch.evictions])
            self._saved.update(zip((move.image for move in batch.evictions), states, strict=True))
        if batch.restores:
            states = [self._saved.pop(move.image) for move in batch.restores]
            runner.restore([move.slot for move in batch.restores], states)

    def _forget(self, left: list[Image], raised: Container[Image] = ()) -> None:
        """Drop what is kept for images that left, and count what they cost in vain: the steps that they took."""
        for image in left:
            self._saved.pop(image, None)
            if image.status is not ImageStatus.DONE:
                self._counts.wasted(image.rows * (image.steps_done - (image in raised)))

    def _choose_width(self, model: str) -> None:
        costs, config, most = self.costs[model], self._config, self._memory[model].rows
        width = min(knee(costs, config.max_rows, config.width_efficiency), most)
        wider = [rows for rows in costs.table() if width < rows <= most]  # not run, they would be too slow for ever
        self.scheduler.set_width(model, width, probe_widths=wider)
        self._counts.width(model, width)

    def _result(
        self,
        image: Image,
        ended: float,
        pixels: npt.NDArray[np.uint8] | None = None,
        failure: FailureReason | None = None,
    ) -> ImageResult:
        started = image.started_at
        return ImageResult(
            request_id=image.request_id,
            position=image.position,
            status=image.status,
            pixels=pixels if image.status is ImageStatus.DONE else None,
            failure=failure,
            queue_s=(ended if started is None else started) - image.submitted_at,
            compute_s=0.0 if started is None else ended - started,
            late_s=0.0 if image.deadline is None else max(0.0, ended - image.deadline),
        )

    def _on_failure(self, batch: StepBatch, kind: FailureKind, images: Sequence[Image]) -> None:
        """Count an attempt that raised; out of memory makes the steps that follow narrower."""
        self._counts.failed_attempt(kind)
        if kind is FailureKind.OUT_OF_MEMORY:
            rows = sum(image.rows for image in images)
            self._memory[batch.model].ran_out(self._runners[batch.model].padded_rows(rows))
            self._choose_width(batch.model)

    def _learn(self, step: _Step) -> None:
        """Count a step, and take in what it took."""
        batch, model, runner = step.batch, step.batch.model, self._runners[step.batch.model]
        self._counts.step(batch, step.outcome, runner.padded_rows(batch.rows), step.seconds)
        self._counts.in_flight(self.scheduler)
        if step.outcome.attempts == 1 and step.is_timed:
            observe_step(self.costs[model], runner, batch.rows, batch.classified_rows, step.seconds)
        if self._memory[model].count_step() or step.number % WIDTH_INTERVAL == 0:
            self._choose_width(model)


def _reason(image: Image, outcome: Outcome) -> FailureReason | None:
    if image.status is not ImageStatus.FAILED:
        return None
    kind = outcome.failures.get(image)
    if kind is None:
        return "not_finite"
    return "out_of_memory" if kind is FailureKind.OUT_OF_MEMORY else "error"
