"""Engine: one step at a time, schedule -> run -> finish. Synchronous and deterministic; threads live elsewhere.

A step that raises is taken again without the images that make it raise (`service.engine.recovery`). An error that
`step` itself raises is the engine's end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from service.backends.base import FailureKind
from service.engine.config import EngineConfig
from service.engine.forecast import DeviceView
from service.engine.observing import observe
from service.engine.recovery import MemoryLimit, Outcome, take_step
from service.engine.request import (
    FAILURE_REASONS,
    FailureReason,
    GenerationRequest,
    Image,
    ImageParams,
    ImageResult,
    ImageStatus,
    Observation,
    PlanKey,
    Start,
    StepBatch,
    images_of,
)
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler
from service.engine.step_costs import StepCosts, knee
from service.engine.watchdog import StepUnderWay
from service.metrics import Metrics

WIDTH_INTERVAL = 64
"""Steps between two looks at the width; costs are running means over more."""
_TIMED = ImageParams(
    plan=PlanKey(sampler="ancestral", spec="2"), num_steps=2, seed=0, image_index=0, class_index=None, cfg_scale=1.0
)
"""An image that only takes time; every model has a plan of two steps."""
_TIMED_CLASSIFIED = replace(_TIMED, classifier_scale=1.0)


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
        """What the last step showed of watched images."""
        self.clock = clock
        self._config = config
        self._runners = runners
        self._metrics = metrics
        self._memory = {model: MemoryLimit(config.max_rows) for model in runners}
        self._saved: dict[Image, object] = {}
        """States of evicted images, in host memory."""
        for reason in FAILURE_REASONS:
            metrics.images_failed.labels(reason)
        for kind in (FailureKind.ROWS, FailureKind.OUT_OF_MEMORY):
            metrics.failed_attempts.labels(kind.value)

    def warm_up(self) -> None:
        """Warm every runner up."""
        for runner in self._runners.values():
            runner.warm_up()

    def measure(self) -> None:
        """Time steps of every batch size, and choose each model's width by them. Only while nothing is in flight.

        Raises:
            RuntimeError: something is in flight, whose slots this would overwrite.
        """
        if self.scheduler.has_work():
            raise RuntimeError("steps can be timed only while nothing is in flight")
        for model, runner in self._runners.items():
            widths = range(1, self._config.max_rows + 1)
            for rows in sorted({runner.padded_rows(rows) for rows in widths}):
                self._time(model, rows, _TIMED)
            for rows in sorted({runner.padded_classified_rows(rows) for rows in widths} - {0}):
                self._time(model, rows, _TIMED_CLASSIFIED)
            self._choose_width(model)

    def _time(self, model: str, rows: int, params: ImageParams) -> None:
        runner = self._runners[model]
        slots = range(min(rows, self._config.max_rows, self._config.num_slots))
        for _ in range(self._config.timed_calls):
            # The plan is written over each time; the scheduler, which knows of none, will write its own
            runner.start([Start(slot=s, params=params, plan_offset=0, write_plan=s == 0) for s in slots])
            begun = self.clock()
            runner.step(list(slots))
            self._observe(model, len(slots), len(slots) * params.classified_rows, self.clock() - begun)

    def _observe(self, model: str, rows: int, classified: int, seconds: float) -> None:
        """Take in what a step of so many rows took, padding not counted."""
        runner = self._runners[model]
        padded = runner.padded_classified_rows(classified) if classified else 0
        self.costs[model].observe(runner.padded_rows(rows), seconds, padded)

    def view(self) -> DeviceView:
        """Return what predictions need; another thread may ask, and gets numbers that are a step old at most."""
        scheduler = self.scheduler
        return DeviceView(
            running=scheduler.running(),
            steps={model: scheduler.steps(model) for model in self._runners},
            widths={model: scheduler.width(model) for model in self._runners},
            costs=self.costs,
        )

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Let a request's images wait for their first step."""
        self.scheduler.add(images_of(request, submitted_at))
        self._count_images()

    def abort(self, request_id: str) -> list[ImageResult]:
        """Take a request out; its rows are free at the next step."""
        aborted = self.scheduler.abort(request_id)
        self._forget(aborted)
        self._count_images()
        return [self._result(image, self.clock()) for image in aborted]

    def has_work(self) -> bool:
        """Say whether any image is in flight."""
        return self.scheduler.has_work()

    def step(self) -> list[ImageResult]:
        """Take one step; returns the images that left with it.

        Raises:
            Exception: the device, or the network, is not to be trusted any more. Nothing can be done with the engine
                after that but to tell everybody who waits.
        """
        begun = self.clock()
        self.observations = []
        batch = self.scheduler.schedule(begun)
        if batch is None:
            return []
        try:
            return self._take(batch, begun)
        finally:
            self.under_way = None

    def _take(self, batch: StepBatch, begun: float) -> list[ImageResult]:
        runner = self._runners[batch.model]
        self._begin(batch, batch.images)
        self._move(batch, runner)
        outcome = take_step(
            batch.images,
            lambda images: self._attempt(batch, images),
            runner,
            lambda kind, images: self._count_failure(batch, kind, images),
        )
        left = self.scheduler.complete(batch, outcome.ok)

        done = [image for image in left if image.status is ImageStatus.DONE]
        slots = [image.slot for image in done if image.slot is not None]
        pixels = dict(zip(done, runner.read(slots), strict=True)) if slots else {}
        self.observations = observe(batch.images, runner)
        ended = self.clock()
        self._forget(left)
        self._count_step(batch, outcome, ended - begun)
        results = [self._result(image, ended, pixels.get(image), _reason(image, outcome)) for image in left]
        for result in results:
            if result.failure is not None:
                self._metrics.images_failed.labels(result.failure).inc()
        return results

    def _attempt(self, batch: StepBatch, images: Sequence[Image]) -> list[bool]:
        """Take the step with some images of its batch, setting those up that it is the first step of."""
        runner, metrics = self._runners[batch.model], self._metrics
        rows = sum(image.rows for image in images)
        slots = [image.slot for image in images if image.slot is not None]
        self._begin(batch, images)
        metrics.network_calls.labels(batch.model).inc()
        metrics.rows_per_call.observe(rows)
        metrics.padded_rows.inc(runner.padded_rows(rows) - rows)
        if classified := sum(image.classified_rows for image in images):
            metrics.classifier_calls.labels(batch.model).inc()
            metrics.classified_rows.labels(batch.model).inc(classified)
        runner.start([start for start in batch.starts if start.slot in slots])
        return runner.step(slots)

    def _begin(self, batch: StepBatch, images: Sequence[Image]) -> None:
        rows = self._runners[batch.model].padded_rows(sum(image.rows for image in images))
        classified = sum(image.classified_rows for image in images)
        self.under_way = StepUnderWay(expected_s=self.costs[batch.model].seconds(rows, classified))

    def _move(self, batch: StepBatch, runner: Runner) -> None:
        """Copy images out of their slots, then others back into slots."""
        if batch.evictions:
            states = runner.evict([move.slot for move in batch.evictions])
            self._saved.update(zip((move.image for move in batch.evictions), states, strict=True))
        if batch.restores:
            states = [self._saved.pop(move.image) for move in batch.restores]
            runner.restore([move.slot for move in batch.restores], states)

    def _forget(self, left: list[Image]) -> None:
        """Drop what is kept for images that left, and count what they cost in vain."""
        for image in left:
            self._saved.pop(image, None)
            if image.status is not ImageStatus.DONE:
                self._metrics.wasted_row_steps.inc(image.rows * image.steps_done)

    def _choose_width(self, model: str) -> None:
        costs, config = self.costs[model], self._config
        width = min(knee(costs, config.max_rows, config.width_efficiency), self._memory[model].rows)
        self.scheduler.set_width(model, width)
        self._metrics.width_rows.labels(model).set(width)

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
            pixels=pixels,
            failure=failure,
            queue_s=(ended if started is None else started) - image.submitted_at,
            compute_s=0.0 if started is None else ended - started,
            late_s=0.0 if image.deadline is None else max(0.0, ended - image.deadline),
        )

    def _count_failure(self, batch: StepBatch, kind: FailureKind, images: Sequence[Image]) -> None:
        """Count an attempt that raised; out of memory makes the steps that follow narrower."""
        self._metrics.failed_attempts.labels(kind.value).inc()
        if kind is FailureKind.OUT_OF_MEMORY:
            rows = sum(image.rows for image in images)
            self._memory[batch.model].ran_out(self._runners[batch.model].padded_rows(rows))
            self._choose_width(batch.model)

    def _count_step(self, batch: StepBatch, outcome: Outcome, seconds: float) -> None:
        metrics = self._metrics
        padded = self._runners[batch.model].padded_rows(batch.rows)
        metrics.row_steps.inc(batch.rows - sum(image.rows for image in outcome.failures))
        metrics.step_seconds.labels(batch.model, str(padded)).observe(seconds)
        metrics.preemptions.inc(batch.preempted)
        metrics.evictions.inc(len(batch.evictions))
        self._count_images()
        if outcome.attempts == 1:
            self._observe(batch.model, batch.rows, batch.classified_rows, seconds)
        if self._memory[batch.model].count_step() or self.scheduler.steps(batch.model) % WIDTH_INTERVAL == 0:
            self._choose_width(batch.model)

    def _count_images(self) -> None:
        self._metrics.images_waiting.set(self.scheduler.num_waiting)
        self._metrics.images_running.set(self.scheduler.num_running)
        self._metrics.images_evicted.set(self.scheduler.num_evicted)
        self._metrics.remaining_row_steps.set(self.scheduler.remaining_row_steps)


def _reason(image: Image, outcome: Outcome) -> FailureReason | None:
    if image.status is not ImageStatus.FAILED:
        return None
    kind = outcome.failures.get(image)
    if kind is None:
        return "not_finite"
    return "out_of_memory" if kind is FailureKind.OUT_OF_MEMORY else "error"
