"""Convert a model's activity to Triton's statistics."""

from __future__ import annotations

from service.engine.activity import Activity
from service.http.kserve.schemas import BatchStats, Duration, InferenceStats, ModelStats
from service.models.served_model import ServedModel

_NOTHING = Duration(count=0, ns=0)
"""Value of phases that take no separate time here, and of the response cache, which the service does not have."""


def model_stats(model: ServedModel, activity: Activity) -> ModelStats:
    """Return the statistics of a model since the process started."""
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
