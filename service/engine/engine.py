"""Engine: take steps in three phases, launch -> settle -> report. Deterministic and single-threaded.

The phases keep the device busy:

- `launch` picks images and starts their step. The images that finish with the step are known at this point.
- `settle` waits for the step and removes the images that failed. Then the next step can be launched. A runner whose
  device executes work in order may have several steps under way; failed images are then detected later.
- `report` does the work that is not urgent: it updates the counts and builds the results of the images that left.
  Call it after launching the next step, or at once if there is none.

A step that raises is repeated without the images that cause the error (`service.engine.recovery`). An error raised by
`step` itself is fatal to the engine.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy.typing as npt

from service.backends.base import FailureKind
from service.engine.activity import Activity
from service.engine.config import EngineConfig
from service.engine.counting import EngineCounts
from service.engine.model_ids import name_of
from service.engine.recovery import MemoryLimit, Outcome
from service.engine.request import (
    FailureReason,
    GenerationRequest,
    GivenArrays,
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
from service.engine.stepping import LaunchedStep, StepEnd, StepTaker
from service.engine.timing import observe_step, time_steps
from service.engine.watchdog import StepUnderWay
from service.metrics import Metrics

WIDTH_INTERVAL = 64
"""Steps between two updates of the width; costs are running means over more steps."""


class SettledStep(NamedTuple):
    """A settled step that has not been reported yet."""

    batch: StepBatch
    number: int
    """Number of steps that its model has taken, including this one."""
    end: StepEnd
    ended: float
    seconds: float
    """Duration: from its launch, or from the end of the previous step if that is later, to its end."""
    is_timed: bool
    """Whether `seconds` is reliable. When several steps settle together, only the first has a known end time."""


class Engine:
    """One device with its scheduler and one runner per model."""

    def __init__(
        self,
        runners: Mapping[str, Runner],
        config: EngineConfig,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        activity: Activity | None = None,
    ) -> None:
        self.scheduler = Scheduler(config, runners, {model: runner.network_of for model, runner in runners.items()})
        self.costs = {model: StepCosts() for model in runners}
        """Measured step costs of each model, by padded rows."""
        self.under_way: StepUnderWay | None = None
        """The current step. Other threads may read it to detect a step that hangs."""
        self.observations: list[Observation] = []
        """Progress and previews of watched images from the steps of the last report."""
        self.advanced: list[Image] = []
        """Images of which the last report has begun the second stage."""
        self.clock = clock
        self._config = config
        self.activity = Activity() if activity is None else activity
        """Work of each model since the process started."""
        self._counts = EngineCounts(metrics, self.activity)
        self._runners = dict(runners)
        self._takers = {model: self._taker(model, runner) for model, runner in runners.items()}
        for model in runners:
            self._counts.add_model(model)
        self._memory = {model: MemoryLimit(self._most_rows(model)) for model in runners}
        self._saved: dict[Image, object] = {}
        """States of evicted images, in host memory."""
        self._launched: deque[LaunchedStep] = deque()
        """Steps under way, oldest first."""
        self._settled: list[SettledStep] = []
        """Steps to report."""
        self._aborted: list[Image] = []
        """Started images that were aborted since the last report."""
        self._ended = -math.inf
        """End time of the last settled step."""
        self.snapshot: Snapshot
        """The last published state of the engine. Other threads may read it."""
        self.publish()

    @property
    def runners(self) -> dict[str, Runner]:
        """Return the runners of the loaded models."""
        return dict(self._runners)

    @property
    def num_saved(self) -> int:
        """Return the number of evicted images whose state is in host memory."""
        return len(self._saved)

    def warm_up(self) -> None:
        """Warm up every runner, which may reduce its rows."""
        for model, runner in self._runners.items():
            runner.warm_up()
            self._memory[model] = MemoryLimit(self._most_rows(model))
            self._choose_width(model)

    def measure(self) -> None:
        """Time steps of every batch size and choose each model's width. Overwrites slots.

        Raises:
            RuntimeError: images are in flight; timing would overwrite their slots.
        """
        if self.has_work():
            raise RuntimeError("steps can be timed only while nothing is in flight")
        for model, runner in self._runners.items():
            self.costs[model] = time_steps(runner, self._config, self.clock)
            self._choose_width(model)
        self.publish()

    def load(self, model: str, runner: Runner, costs: StepCosts) -> None:
        """Load a model between two steps. The caller has warmed up its runner and timed its steps."""
        self.costs[model] = costs
        self._runners[model], self._takers[model] = runner, self._taker(model, runner)
        self.scheduler.add_model(model, runner.network_of)
        self._counts.add_model(model)
        self._memory[model] = MemoryLimit(self._most_rows(model))
        self._choose_width(model)
        self.publish()

    def drop(self, model: str) -> None:
        """Unload a model and free its weights.

        Raises:
            RuntimeError: the model has images in flight, or steps that are under way or unreported.
        """
        launched = any(step.batch.model == model for step in self._launched)
        if launched or any(step.batch.model == model for step in self._settled):
            raise RuntimeError(f"model {model} has steps that were not reported")
        self.scheduler.remove_model(model)
        del self._runners[model], self._takers[model], self._memory[model], self.costs[model]
        self.publish()
        if all(name_of(other) != name_of(model) for other in self._runners):
            self._counts.remove_model(model)

    def publish(self) -> None:
        """Replace the snapshot with the current state."""
        lefts = [*[step.left for step in self._launched], *[step.end.left for step in self._settled]]
        leaving = dict.fromkeys(chain(self._aborted, *lefts))  # an image may fail before it would have ended
        scheduler = self.scheduler
        self.snapshot = Snapshot.of(
            images=(*scheduler.started(), *leaving),
            steps=scheduler.all_steps(),
            widths=scheduler.all_widths(),
            costs={model: costs.now for model, costs in self.costs.items()},
        )

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Accept a request without admission control."""
        self.enter(self.scheduler.order.images_of(request, submitted_at, self.scheduler.all_steps()))

    def enter(self, images: Sequence[Image]) -> None:
        """Queue accepted images for their first step."""
        self.scheduler.add(images)
        self._counts.in_flight(self.scheduler)

    def abort(self, request_id: str) -> list[ImageResult]:
        """Abort a request and return the results of its images; its rows are free at the next step.

        Its started images stay in the snapshot until a step has been launched and reported, as those of a step do.
        """
        aborted = [*self.scheduler.abort(request_id), *self._abort_between(request_id)]
        self._aborted += [image for image in aborted if image.started_at is not None]
        self._forget(aborted)
        self._counts.in_flight(self.scheduler)
        return [self._result(image, self.clock()) for image in aborted]

    def _abort_between(self, request_id: str) -> list[Image]:
        """Abort the second stages of images whose first one has ended but is not reported; return them."""
        lefts = [*[step.left for step in self._launched], *[step.end.left for step in self._settled]]
        aborted = []
        for image in chain(*lefts):
            if image.request_id == request_id and image.then is not None and image.then.status is ImageStatus.WAITING:
                image.then.status = ImageStatus.ABORTED
                image.then.begun_before = image.started_at
                aborted.append(image.then)
        return aborted

    def has_work(self) -> bool:
        """Return whether any image is in flight, any step is under way, or any second stage is about to begin."""
        return self.scheduler.has_work() or bool(self._launched) or any(map(_continues, self._settled))

    def step(self) -> list[ImageResult]:
        """Launch, settle and report one step, without overlap.

        Raises:
            Exception: as `launch`, `settle` and `report`.
        """
        self.launch()
        self.settle()
        return self.report()

    def launch(self) -> None:
        """Pick images and start their next step. Do nothing if no image is in flight.

        Raises:
            Exception: the device can no longer be trusted. The engine is unusable; the caller must fail all pending
                requests.
        """
        begun = self.clock()
        batch = self.scheduler.schedule(begun)
        if batch is None:
            return
        try:
            if not self._launched:
                self._expect(batch)
            self._move(batch)
            self._launched.append(self._takers[batch.model].launch(batch, begun))
        except BaseException:
            self.under_way = None
            raise
        self.publish()

    def settle(self) -> None:
        """Wait until at most `depth` steps are under way; wait for at least one if no other can be launched.

        Raises:
            Exception: the device or the network can no longer be trusted, as for `launch`.
        """
        if not self._launched:
            return
        depth = self._takers[self._launched[-1].batch.model].depth
        most = depth if self.scheduler.has_work() else min(depth, len(self._launched) - 1)
        self._settle_down_to(most)

    def settle_all(self) -> None:
        """Wait for every step under way. Raises as `settle`."""
        self._settle_down_to(0)

    def _settle_down_to(self, most: int) -> None:
        is_first = True
        while len(self._launched) > most:
            self._settle_oldest(is_first)
            is_first = False

    def _settle_oldest(self, is_timed: bool) -> None:
        """Wait for the oldest step and remove the images that failed."""
        step = self._launched[0]
        try:
            end = step.settle()
        finally:
            self.under_way = None
        ended = self.clock()
        seconds = ended - max(step.begun, self._ended)
        self._settled.append(SettledStep(step.batch, step.number, end, ended, seconds, is_timed))
        self._launched.popleft()
        self._ended = ended
        if self._launched:
            self._expect(self._launched[0].batch)

    def report(self) -> list[ImageResult]:
        """Count the settled steps and return the results of the images that left with them.

        Raises:
            Exception: as `launch`.
        """
        settled = self._settled
        self.observations = [seen for step in settled for seen in step.end.shown.seen.wait()]
        self.advanced = []
        results = [result for step in settled for result in self._report(step)]
        self._settled = []
        self._aborted = []
        return results

    def _report(self, step: SettledStep) -> list[ImageResult]:
        outcome, ended, shown = step.end
        # An image that was aborted between its stages has its result
        left = [image for image in ended if image.then is None or image.then.status is not ImageStatus.ABORTED]
        outputs = {} if shown.outputs is None else dict(zip(shown.done, shown.outputs.wait(), strict=True))
        self._forget(left, outcome.failures)
        self._learn(step)
        results = []
        for image in left:
            result = self._result(image, step.ended, outputs.get(image), _reason(image, outcome))
            if image.then is not None and image.status is ImageStatus.DONE:
                self._advance(image, image.then, result)
            else:
                results.append(result)
        self._counts.failed(results)
        return results

    def _advance(self, image: Image, later: Image, result: ImageResult) -> None:
        """Begin the second stage of an image with the result of its first one."""
        assert image.request.then is not None  # noqa: S101  # `Image`
        cond = image.request.then.cond_of(image.params, result)
        later.params = replace(later.params, given=GivenArrays(cond=cond))
        later.begun_before = image.started_at
        self.advanced.append(image)
        self.enter([later])

    def _taker(self, model: str, runner: Runner) -> StepTaker:
        return StepTaker(
            runner,
            self.scheduler,
            attempted=lambda part: self._counts.attempt(part, runner),
            expect=self._expect,
            failed=self._on_failure,
        )

    def _expect(self, part: StepBatch) -> None:
        """Publish the step under way and its expected duration."""
        padded = self._runners[part.model].padded_rows(part.rows)
        self.under_way = StepUnderWay(expected_s=self.costs[part.model].seconds(padded, part.classified_rows))

    def _move(self, batch: StepBatch) -> None:
        """Evict images from their slots, then restore others into free slots."""
        runner = self._runners[batch.model]
        if batch.evictions:
            states = runner.evict([move.slot for move in batch.evictions])
            self._saved.update(zip((move.image for move in batch.evictions), states, strict=True))
        if batch.restores:
            states = [self._saved.pop(move.image) for move in batch.restores]
            runner.restore([move.slot for move in batch.restores], states)

    def _forget(self, left: Iterable[Image], raised: Container[Image] = ()) -> None:
        """Drop the saved states of images that left, and count the steps of incomplete ones as wasted."""
        for image in left:
            self._saved.pop(image, None)
            if image.status is not ImageStatus.DONE:
                self._counts.wasted(image.row_steps_before + image.rows * (image.steps_done - (image in raised)))

    def _choose_width(self, model: str) -> None:
        costs, most = self.costs[model], self._memory[model].rows
        width = min(knee(costs, self._most_rows(model), self._config.width_efficiency), most)
        # Try wider widths: a cost measured too high would otherwise never be corrected
        wider = [rows for rows in costs.table() if width < rows <= most]
        self.scheduler.set_width(model, width, trial_widths=wider)
        self._counts.width(model, width)

    def _most_rows(self, model: str) -> int:
        return min(self._config.max_rows, self._runners[model].max_rows)

    def _result(
        self,
        image: Image,
        ended: float,
        output: npt.NDArray[Any] | None = None,
        failure: FailureReason | None = None,
    ) -> ImageResult:
        started = image.begun_at
        done = {image.params.output: output} if image.status is ImageStatus.DONE else {}
        return ImageResult(
            request_id=image.request_id,
            position=image.position,
            status=image.status,
            pixels=done.get("pixels"),
            values=done.get("values"),
            failure=failure,
            queue_s=(ended if started is None else started) - image.submitted_at,
            compute_s=0.0 if started is None else ended - started,
            late_s=0.0 if image.deadline is None else max(0.0, ended - image.deadline),
        )

    def _on_failure(self, kind: FailureKind, part: StepBatch) -> None:
        """Count a failed attempt. After running out of memory, reduce the width of later steps."""
        self._counts.failed_attempt(kind)
        if kind is FailureKind.OUT_OF_MEMORY:
            self._memory[part.model].ran_out(self._runners[part.model].padded_rows(part.rows))
            self._choose_width(part.model)

    def _learn(self, step: SettledStep) -> None:
        """Count a step and update the costs with its duration."""
        batch, outcome, model = step.batch, step.end.outcome, step.batch.model
        runner = self._runners[model]
        self._counts.step(batch, outcome, runner.padded_rows(batch.rows), step.seconds)
        self._counts.in_flight(self.scheduler)
        if outcome.attempts == 1 and step.is_timed:
            observe_step(self.costs[model], runner, batch.rows, batch.classified_rows, step.seconds)
        if self._memory[model].count_step() or step.number % WIDTH_INTERVAL == 0:
            self._choose_width(model)


def _continues(step: SettledStep) -> bool:
    """Return whether the second stage of an image is waiting for the report of a step."""
    return any(image.then is not None and image.then.status is ImageStatus.WAITING for image in step.end.left)


def _reason(image: Image, outcome: Outcome) -> FailureReason | None:
    if image.status is not ImageStatus.FAILED:
        return None
    kind = outcome.failures.get(image)
    if kind is None:
        return "not_finite"
    return "out_of_memory" if kind is FailureKind.OUT_OF_MEMORY else "error"
