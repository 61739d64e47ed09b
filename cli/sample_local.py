"""Sample in this process with the service's engine, so that the pixels equal the service's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.local_engine import LocalEngine
from cli.sampled import CheckImages, SampledImage
from cli.split_requests import split_requests

if TYPE_CHECKING:
    from service.engine.request import ImageParams


def sample_local(model: Path, params: dict[str, Any], n: int | None, check: CheckImages) -> list[SampledImage]:
    """Sample images with a model folder.

    Args:
        model: the folder, as FOLDER or NAME=FOLDER.
        params: fields of a request, including the seed.
        n: number of images; None: one per given image.
        check: called when the model is loaded.

    Raises:
        ValidationError: a field, or a setting in the environment, breaks a rule.
        ValueError: an environment variable has the name of an unknown setting; also from `check`.
        InvalidRequest: a field breaks a rule of the model, or a given image has another shape than its images.
        ModelError: the model cannot be run.
        GenerationFailed: an image failed.
    """
    from service.requests.generate_request import MAX_IMAGES

    engine = LocalEngine(model, lambda config: check(config.model.image_channels, config.model.image_size))
    images: list[ImageParams] = []
    given = engine.read_given(params)
    for fields in split_requests(params, n, MAX_IMAGES, lambda: engine.class_names):
        images += engine.complete(fields, given)

    row_steps = sum(image.rows * image.num_steps for image in images)
    with typer.progressbar(length=row_steps, label="sampling", file=sys.stderr) as bar:
        ((_, pixels),) = engine.run([images], bar.update)
    return [
        SampledImage(
            seed=p.seed,
            image_index=p.image_index,
            class_index=p.class_index,
            numerics_id=engine.numerics_id,
            pixels=pixels[k],
        )
        for k, p in enumerate(images)
    ]
