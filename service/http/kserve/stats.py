"""Triton's statistics of a model, read from our metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from service.http.kserve.schemas import BatchStats, Duration, InferenceStats, ModelStats
from service.metrics import Metrics
from service.models.served_model import ServedModel

_NOTHING = Duration(count=0, ns=0)
"""What takes no time of its own here, or is no thing here: there is no cache of answers."""


def model_stats(model: ServedModel, metrics: Metrics) -> ModelStats:
    """Return what a model has done since the process began."""
    done = int(_value(metrics.model_images, model=model.name, outcome="done"))
    failed = int(_value(metrics.model_images, model=model.name, outcome="failed"))
    queue_s = _value(metrics.model_image_seconds, model=model.name, phase="queue")
    compute_s = _value(metrics.model_image_seconds, model=model.name, phase="compute")
    return ModelStats(
        name=model.name,
        version=model.numerics_id,
        last_inference=int(_value(metrics.model_last_image, model=model.name) * 1000),
        inference_count=done,
        execution_count=int(_value(metrics.network_calls, model=model.name)),
        inference_stats=InferenceStats(
            success=_duration(done, queue_s + compute_s),
            fail=_duration(failed, 0.0),
            queue=_duration(done, queue_s),
            compute_input=_NOTHING,
            compute_infer=_duration(done, compute_s),
            compute_output=_NOTHING,
            cache_hit=_NOTHING,
            cache_miss=_NOTHING,
        ),
        batch_stats=[
            BatchStats(batch_size=rows, compute_input=_NOTHING, compute_infer=steps, compute_output=_NOTHING)
            for rows, steps in sorted(_steps_by_rows(model.name, metrics.step_seconds).items())
        ],
    )


def _value(metric: Counter | Gauge, **labels: str) -> float:
    """Return a metric's value, 0 where it has none yet; a lookup in the registry would collect all metrics."""
    samples = (sample for family in metric.collect() for sample in family.samples)
    return next((s.value for s in samples if s.labels == labels and not s.name.endswith("_created")), 0.0)


def _steps_by_rows(model: str, step_seconds: Histogram) -> dict[int, Duration]:
    counts: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for family in step_seconds.collect():
        for sample in family.samples:
            if sample.labels["model"] == model:
                by_rows = {"_count": counts, "_sum": seconds}.get(sample.name.removeprefix(family.name))
                if by_rows is not None:
                    by_rows[int(sample.labels["padded_rows"])] = sample.value
    return {rows: _duration(int(count), seconds[rows]) for rows, count in counts.items()}


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count=count, ns=round(seconds * 1e9))
