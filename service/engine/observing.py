"""Collect progress and previews of watched images after a step. Other images are not read."""

from __future__ import annotations

from collections.abc import Sequence

from service.backends.pending import Later, Pending
from service.engine.request import Image, ImagePreview, ImageProgress, ImageStatus, Observation
from service.engine.runners.base import Runner


def observe(images: Sequence[Image], runner: Runner) -> Pending[list[Observation]]:
    """Collect the progress of the watched, unfinished images of a step, and the previews that are due.

    Returns:
        The pending observations; pixels are converted when the result is waited for.
    """
    watched = [image for image in images if image.request.watch is not None and image.status is ImageStatus.RUNNING]
    steps = [
        ImageProgress(
            request_id=image.request_id,
            position=image.position,
            step=image.steps_before + image.steps_done,
            steps=image.request.num_steps(image.position),
        )
        for image in watched
    ]
    due = [(image.slot, step) for image, step in zip(watched, steps, strict=True) if _preview_is_due(image)]
    if not due:
        return Later(lambda: [*steps])
    preview = runner.preview([slot for slot, _ in due if slot is not None])

    def observations() -> list[Observation]:
        previews = [
            ImagePreview(
                request_id=step.request_id, position=step.position, step=step.step, steps=step.steps, pixels=pixels
            )
            for (_, step), pixels in zip(due, preview.wait(), strict=True)
        ]
        return [*steps, *previews]

    return Later(observations)


def _preview_is_due(image: Image) -> bool:
    every = None if image.watch is None else image.watch.preview_every
    return every is not None and (image.steps_before + image.steps_done) % every == 0
