"""Engine: one step at a time, schedule -> run -> finish. Synchronous and deterministic; threads live elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from service.engine.config import EngineConfig
from service.engine.request import GenerationRequest, Image, ImageResult, ImageStatus, StepBatch
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler
from service.metrics import Metrics

RATE_SMOOTHING = 0.05
"""Weight of the newest step in the running estimate of the time a row-step takes."""


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
        self.seconds_per_row_step = 0.0
        """Running estimate; 0 before the first step."""
        self._runners = runners
        self._metrics = metrics
        self._clock = clock

    def warm_up(self) -> None:
        """Warm every runner up."""
        for runner in self._runners.values():
            runner.warm_up()

    def add(self, request: GenerationRequest, submitted_at: float) -> None:
        """Let a request's images wait for their first step."""
        self.scheduler.add(
            Image(
                request_id=request.request_id,
                position=position,
                model=request.model,
                params=params,
                submitted_at=submitted_at,
            )
            for position, params in enumerate(request.images)
        )
        self._count_images()

    def abort(self, request_id: str) -> list[ImageResult]:
        """Take a request out; its rows are free at the next step."""
        aborted = self.scheduler.abort(request_id)
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
        runner.start(batch.starts)
        ok = runner.step(batch.slots)
        left = self.scheduler.complete(batch, ok)

        done = [image for image in left if image.status is ImageStatus.DONE]
        slots = [image.slot for image in done if image.slot is not None]
        pixels = dict(zip(done, runner.read(slots), strict=True)) if slots else {}
        ended = self._clock()
        self._count_step(batch, runner, ended - begun)
        return [self._result(image, ended, pixels.get(image)) for image in left]

    def _result(self, image: Image, ended: float, pixels: npt.NDArray[np.uint8] | None = None) -> ImageResult:
        started = image.started_at
        return ImageResult(
            request_id=image.request_id,
            position=image.position,
            status=image.status,
            pixels=pixels,
            queue_s=(ended if started is None else started) - image.submitted_at,
            compute_s=0.0 if started is None else ended - started,
        )

    def _count_step(self, batch: StepBatch, runner: Runner, seconds: float) -> None:
        metrics = self._metrics
        metrics.network_calls.labels(batch.model).inc()
        metrics.rows_per_call.observe(batch.rows)
        metrics.padded_rows.inc(runner.padded_rows(batch.rows) - batch.rows)
        metrics.row_steps.inc(batch.rows)
        metrics.step_seconds.observe(seconds)
        self._count_images()
        sample = seconds / batch.rows
        known = self.seconds_per_row_step
        self.seconds_per_row_step = sample if known == 0 else known + RATE_SMOOTHING * (sample - known)

    def _count_images(self) -> None:
        self._metrics.images_waiting.set(self.scheduler.num_waiting)
        self._metrics.images_running.set(self.scheduler.num_running)
