"""What the engine tells Prometheus of its work. It only counts: nothing is decided by it."""

from __future__ import annotations

from collections.abc import Sequence

from service.backends.base import FailureKind
from service.engine.model_ids import name_of
from service.engine.recovery import Outcome
from service.engine.request import FAILURE_REASONS, ImageResult, StepBatch
from service.engine.runners.base import Runner
from service.engine.scheduler import Scheduler
from service.metrics import Metrics


class EngineCounts:
    """Writes the metrics of one engine. Those by reason exist from the start: a first failure is an increase too."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        for reason in FAILURE_REASONS:
            metrics.images_failed.labels(reason)
        for kind in (FailureKind.ROWS, FailureKind.OUT_OF_MEMORY):
            metrics.failed_attempts.labels(kind.value)

    def attempt(self, model: str, runner: Runner, rows: int, classified: int) -> None:
        """Count a network call of so many rows, and the classifier call that goes with it, if any."""
        metrics, name = self._metrics, name_of(model)
        metrics.network_calls.labels(name).inc()
        metrics.rows_per_call.observe(rows)
        metrics.padded_rows.inc(runner.padded_rows(rows) - rows)
        metrics.uncaptured_steps.labels(name).inc(runner.is_uncaptured(rows))
        if classified:
            metrics.classifier_calls.labels(name).inc()
            metrics.classified_rows.labels(name).inc(classified)

    def failed_attempt(self, kind: FailureKind) -> None:
        """Count an attempt that raised."""
        self._metrics.failed_attempts.labels(kind.value).inc()

    def step(self, batch: StepBatch, outcome: Outcome, padded_rows: int, seconds: float) -> None:
        """Count a step, however many attempts it took."""
        metrics = self._metrics
        metrics.row_steps.inc(batch.rows - sum(image.rows for image in outcome.failures))
        metrics.step_seconds.labels(name_of(batch.model), str(padded_rows)).observe(seconds)
        metrics.preemptions.inc(batch.preempted)
        metrics.evictions.inc(len(batch.evictions))

    def wasted(self, row_steps: int) -> None:
        """Count work that came to nothing."""
        self._metrics.wasted_row_steps.inc(row_steps)

    def failed(self, results: Sequence[ImageResult]) -> None:
        """Count those of some results that are failures, by reason."""
        for result in results:
            if result.failure is not None:
                self._metrics.images_failed.labels(result.failure).inc()

    def in_flight(self, scheduler: Scheduler) -> None:
        """Say how many images are where, and how much work is left of them."""
        metrics = self._metrics
        metrics.images_waiting.set(scheduler.num_waiting)
        metrics.images_running.set(scheduler.num_running)
        metrics.images_evicted.set(scheduler.num_evicted)
        metrics.remaining_row_steps.set(scheduler.remaining_row_steps)

    def width(self, model: str, rows: int) -> None:
        """Say how many rows a model's step may have, but for probes."""
        self._metrics.width_rows.labels(name_of(model)).set(rows)

    def model_gone(self, model: str) -> None:
        """Forget what is said of a model's name, which none has any more."""
        self._metrics.width_rows.remove(name_of(model))
