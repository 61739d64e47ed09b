"""Count the engine's work, as Prometheus metrics and as plain counts. No decision depends on these counts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from service.backends.base import FailureKind
from service.engine.activity import Activity
from service.engine.model_ids import name_of
from service.engine.recovery import Outcome
from service.engine.request import FAILURE_REASONS, ImageResult, StepBatch
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler
from service.metrics import Metrics


class EngineCounts:
    """Writes the metrics and the activity of one engine.

    Series of failures and models are created at start, so that their first event is visible as an increase.
    """

    def __init__(self, metrics: Metrics, activity: Activity) -> None:
        self._metrics = metrics
        self._activity = activity
        for reason in FAILURE_REASONS:
            metrics.images_failed.labels(reason)
        for kind in (FailureKind.ROWS, FailureKind.OUT_OF_MEMORY):
            metrics.failed_attempts.labels(kind.value)

    def add_model(self, model: str) -> None:
        """Create the series of a model."""
        name = name_of(model)
        for counter in (self._metrics.network_calls, self._metrics.uncaptured_steps):
            counter.labels(name)

    def attempt(self, part: StepBatch, runner: Runner) -> None:
        """Count a network call by its rows, and its classifier call if images are guided by a classifier."""
        metrics, name, rows, classified = self._metrics, name_of(part.model), part.rows, part.classified_rows
        metrics.network_calls.labels(name).inc()
        for counted in (name, *part.cascades):
            self._activity.of(counted).network_calls += 1
        metrics.rows_per_call.observe(rows)
        if padding := runner.padded_rows(rows) - rows:
            metrics.padded_rows.inc(padding)
        if runner.is_uncaptured(rows):
            metrics.uncaptured_steps.labels(name).inc()
        if classified:
            metrics.classifier_calls.labels(name).inc()
            metrics.classified_rows.labels(name).inc(classified)

    def failed_attempt(self, kind: FailureKind) -> None:
        """Count an attempt that raised."""
        self._metrics.failed_attempts.labels(kind.value).inc()

    def step(self, batch: StepBatch, outcome: Outcome, padded_rows: int, seconds: float) -> None:
        """Count a step once, regardless of its number of attempts."""
        metrics, name = self._metrics, name_of(batch.model)
        row_steps = batch.rows - sum([image.rows for image in outcome.failures])
        metrics.row_steps.inc(row_steps)
        self._activity.row_steps += row_steps
        metrics.step_seconds.labels(name, str(padded_rows)).observe(seconds)
        for counted in (name, *batch.cascades):
            total = self._activity.of(counted).steps[padded_rows]
            total.count += 1
            total.seconds += seconds
        if batch.preempted:
            metrics.preemptions.inc(batch.preempted)
        if batch.evictions:
            metrics.evictions.inc(len(batch.evictions))

    def wasted(self, row_steps: int) -> None:
        """Count row-steps of images that were cancelled or failed."""
        self._metrics.wasted_row_steps.inc(row_steps)

    def failed(self, results: Sequence[ImageResult]) -> None:
        """Count the failures among results, by reason."""
        for result in results:
            if result.failure is not None:
                self._metrics.images_failed.labels(result.failure).inc()

    def in_flight(self, scheduler: Scheduler) -> None:
        """Set the gauges of waiting, running and evicted images and of the remaining work."""
        metrics = self._metrics
        metrics.images_waiting.set(scheduler.num_waiting)
        metrics.images_running.set(scheduler.num_running)
        metrics.images_evicted.set(scheduler.num_evicted)
        metrics.remaining_row_steps.set(scheduler.remaining_row_steps)

    def width(self, model: str, rows: int) -> None:
        """Set the gauge of a model's width in rows, excluding trial widths."""
        self._metrics.width_rows.labels(name_of(model)).set(rows)

    def remove_model(self, model: str) -> None:
        """Remove the gauges of a model name that is no longer in use."""
        self._metrics.width_rows.remove(name_of(model))


class ImageCounts:
    """Writes the metrics and the activity of images that ended. Runs in the event loop."""

    def __init__(self, metrics: Metrics, activity: Activity) -> None:
        self._metrics = metrics
        self._activity = activity

    def done(self, name: str, result: ImageResult) -> None:
        """Count a completed image of a model or cascade, and record its times."""
        self._metrics.image_done(name, result.queue_s, result.compute_s)
        self._metrics.deadline_misses.inc(result.late_s > 0)
        counts = self._activity.of(name)
        counts.images_done += 1
        counts.queue_s += result.queue_s
        counts.compute_s += result.compute_s
        counts.last_image_at = time.time()

    def failed(self, name: str) -> None:
        """Count a failed image of a model or cascade."""
        self._metrics.model_images.labels(name, "failed").inc()
        self._activity.of(name).images_failed += 1
