"""Engine: one step at a time, schedule -> run -> finish. Synchronous and deterministic; threads live elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from service.engine.config import EngineConfig
from service.engine.forecast import DeviceView
from service.engine.request import (
    GenerationRequest,
    Image,
    ImageParams,
    ImageResult,
    ImageStatus,
    PlanKey,
    Start,
    StepBatch,
    images_of,
)
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler
from service.engine.step_costs import StepCosts, knee
from service.metrics import Metrics

WIDTH_INTERVAL = 64
"""Steps between two looks at the width; costs are running means over more."""
_TIMED = ImageParams(
    plan=PlanKey(sampler="ancestral", spec="2"), num_steps=2, seed=0, image_index=0, class_index=None, cfg_scale=1.0
)
"""An image that only takes time; every model has a plan of two steps."""


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
        self._config = config
        self._runners = runners
        self._metrics = metrics
        self._clock = clock
        self._saved: dict[Image, object] = {}
        """States of evicted images, in host memory."""

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
            for rows in sorted({runner.padded_rows(rows) for rows in range(1, self._config.max_rows + 1)}):
                slots = range(min(rows, self._config.num_slots))
                for _ in range(self._config.timed_calls):
                    # The plan is written over each time; the scheduler, which knows of none, will write its own
                    runner.start([Start(slot=s, params=_TIMED, plan_offset=0, write_plan=s == 0) for s in slots])
                    begun = self._clock()
                    runner.step(list(slots))
                    self.costs[model].observe(rows, self._clock() - begun)
            self._choose_width(model)

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
        return [self._result(image, self._clock()) for image in aborted]

    def has_work(self) -> bool:
        """Say whether any image is in flight."""
        return self.scheduler.has_work()

    def step(self) -> list[ImageResult]:
        """Take one step; returns the images that left with it."""
        begun = self._clock()
        batch = self.scheduler.schedule(begun)
        if batch is None:
            return []
        runner = self._runners[batch.model]
        self._move(batch, runner)
        runner.start(batch.starts)
        ok = runner.step(batch.slots)
        left = self.scheduler.complete(batch, ok)

        done = [image for image in left if image.status is ImageStatus.DONE]
        slots = [image.slot for image in done if image.slot is not None]
        pixels = dict(zip(done, runner.read(slots), strict=True)) if slots else {}
        ended = self._clock()
        self._forget(left)
        self._count_step(batch, runner, ended - begun)
        return [self._result(image, ended, pixels.get(image)) for image in left]

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
        width = knee(costs, config.max_rows, config.width_efficiency)
        self.scheduler.set_width(model, width)
        self._metrics.width_rows.labels(model).set(width)

    def _result(self, image: Image, ended: float, pixels: npt.NDArray[np.uint8] | None = None) -> ImageResult:
        started = image.started_at
        return ImageResult(
            request_id=image.request_id,
            position=image.position,
            status=image.status,
            pixels=pixels,
            queue_s=(ended if started is None else started) - image.submitted_at,
            compute_s=0.0 if started is None else ended - started,
            late_s=0.0 if image.deadline is None else max(0.0, ended - image.deadline),
        )

    def _count_step(self, batch: StepBatch, runner: Runner, seconds: float) -> None:
        metrics, rows = self._metrics, batch.rows
        padded = runner.padded_rows(rows)
        metrics.network_calls.labels(batch.model).inc()
        metrics.rows_per_call.observe(rows)
        metrics.padded_rows.inc(padded - rows)
        metrics.row_steps.inc(rows)
        metrics.step_seconds.labels(batch.model, str(padded)).observe(seconds)
        metrics.preemptions.inc(batch.preempted)
        metrics.evictions.inc(len(batch.evictions))
        self._count_images()
        self.costs[batch.model].observe(padded, seconds)
        if self.scheduler.steps(batch.model) % WIDTH_INTERVAL == 0:
            self._choose_width(batch.model)

    def _count_images(self) -> None:
        self._metrics.images_waiting.set(self.scheduler.num_waiting)
        self._metrics.images_running.set(self.scheduler.num_running)
        self._metrics.images_evicted.set(self.scheduler.num_evicted)
        self._metrics.remaining_row_steps.set(self.scheduler.remaining_row_steps)
