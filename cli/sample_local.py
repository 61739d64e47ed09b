"""Sample in this process with the service's engine, so that the pixels equal the service's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.local_engine import LocalEngine, local_settings
from cli.sampled import CheckImages, SampledImage
from cli.split_requests import split_requests

if TYPE_CHECKING:
    from diffusion.config import CheckpointConfig


def sample_local(
    models: Sequence[Path], cascade: str | None, params: dict[str, Any], n: int | None, check: CheckImages
) -> list[SampledImage]:
    """Sample images with a model folder, or with the two of a cascade.

    Args:
        models: the folders, as FOLDER or NAME=FOLDER.
        cascade: NAME=BASE+UPSAMPLER; None: there is one model.
        params: fields of a request, including the seed.
        n: number of images; None: one per given image.
        check: called when the models are loaded.

    Raises:
        ValidationError: a field, or a setting in the environment, breaks a rule.
        ValueError: an environment variable has the name of an unknown setting, there are more models than are run, or
            a given file holds several arrays for other images; also from `check`.
        InvalidRequest: a field breaks a rule of the model, or a given image has another shape than its images.
        ModelError: the model cannot be run.
        GenerationFailed: an image failed.
    """
    from service.requests.generate_request import MAX_IMAGES

    def check_result(config: CheckpointConfig) -> None:
        check(config.model.image_channels, config.model.image_size)

    engine = LocalEngine(local_settings(*models, cascade=cascade), check_result)
    given = engine.read_given(params)  # of all requests
    requests = [
        engine.complete(fields, given) for fields in split_requests(params, n, MAX_IMAGES, lambda: engine.class_names)
    ]
    if len(requests) > 1 and len(given) > 1:  # each request would begin with the first ones
        raise ValueError(f"given files must hold one array with more than {MAX_IMAGES} images; they hold {len(given)}")
    row_steps = sum(request.row_steps for request in requests)
    with typer.progressbar(length=row_steps, label="sampling", file=sys.stderr) as bar:
        ((_, pixels),) = engine.run([requests], bar.update)
    return [
        SampledImage(
            seed=p.seed,
            image_index=p.image_index,
            class_index=p.class_index,
            numerics_id=engine.numerics_id,
            pixels=pixels[k],
        )
        for k, p in enumerate(image for request in requests for image in request.images)
    ]
