"""What a step shows of watched images. Of others nothing is read, and nothing is said."""

from __future__ import annotations

from collections.abc import Sequence

from service.engine.request import Image, ImagePreview, ImageStatus, ImageStep, Observation
from service.engine.runners.base import Runner


def observe(images: Sequence[Image], runner: Runner) -> list[Observation]:
    """Say how far the watched images of a step have come that go on, and what those show whose preview is due."""
    watched = [image for image in images if image.watch is not None and image.status is ImageStatus.RUNNING]
    seen: list[Observation] = [
        ImageStep(
            request_id=image.request_id, position=image.position, step=image.steps_done, steps=image.params.num_steps
        )
        for image in watched
    ]
    due = [image for image in watched if _preview_is_due(image)]
    slots = [image.slot for image in due if image.slot is not None]
    if slots:
        seen += [
            ImagePreview(
                request_id=image.request_id,
                position=image.position,
                step=image.steps_done,
                steps=image.params.num_steps,
                pixels=pixels,
            )
            for image, pixels in zip(due, runner.preview(slots), strict=True)
        ]
    return seen


def _preview_is_due(image: Image) -> bool:
    every = None if image.watch is None else image.watch.preview_every
    return every is not None and image.steps_done % every == 0
