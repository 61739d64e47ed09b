"""Triton's statistics of a model."""

from __future__ import annotations

from service.engine.activity import Activity
from service.http.kserve.schemas import BatchStats, Duration, InferenceStats, ModelStats
from service.models.served_model import ServedModel

_NOTHING = Duration(count=0, ns=0)
"""For phases that take no time of their own here, and for the response cache, which the service does not have."""


def model_stats(model: ServedModel, activity: Activity) -> ModelStats:
    """Return what a model has done since the process began."""
    did = activity.of(model.name)
    return ModelStats(
        name=model.name,
        version=model.numerics_id,
        last_inference=int(did.last_image_at * 1000),
        inference_count=did.images_done,
        execution_count=did.network_calls,
        inference_stats=InferenceStats(
            success=_duration(did.images_done, did.queue_s + did.compute_s),
            fail=_duration(did.images_failed, 0.0),
            queue=_duration(did.images_done, did.queue_s),
            compute_input=_NOTHING,
            compute_infer=_duration(did.images_done, did.compute_s),
            compute_output=_NOTHING,
            cache_hit=_NOTHING,
            cache_miss=_NOTHING,
        ),
        batch_stats=[
            BatchStats(
                batch_size=rows,
                compute_input=_NOTHING,
                compute_infer=_duration(steps.count, steps.seconds),
                compute_output=_NOTHING,
            )
            for rows, steps in sorted(did.steps.items())
        ],
    )


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count=count, ns=round(seconds * 1e9))
