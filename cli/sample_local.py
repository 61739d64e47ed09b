"""Sample in this process with the service's engine, so that the pixels equal the service's.

The service's settings are read from the environment, because pixels depend on them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.sampled import CheckImages, SampledImage
from cli.split_requests import split_requests

if TYPE_CHECKING:
    from formats.images import Uint8Array
    from service.engine.request import ImageParams


def sample_local(model: Path, params: dict[str, Any], n: int, check: CheckImages) -> list[SampledImage]:
    """Sample images with a model folder.

    Args:
        model: the folder, as FOLDER or NAME=FOLDER.
        params: fields of a request, including the seed.
        n: number of images.
        check: called when the model is loaded.

    Raises:
        ValidationError: a field, or a setting in the environment, breaks a rule.
        ValueError: an environment variable has the name of an unknown setting; also from `check`.
        InvalidRequest: a field breaks a rule of the model.
        ModelError: the model cannot be run.
        GenerationFailed: an image failed.
    """
    from service.backends.select import load_denoiser
    from service.engine.engine import Engine
    from service.engine.request import GenerationRequest
    from service.engine.runners.array_runner import ArrayRunner
    from service.engine.tickets import image_failure
    from service.metrics import Metrics
    from service.models.registry import served_model
    from service.requests.completion import complete
    from service.requests.generate_request import MAX_IMAGES, GenerateRequest
    from service.settings import Settings, refuse_unknown_variables

    refuse_unknown_variables()
    settings = Settings(models=(model,), host="127.0.0.1")  # no socket is opened
    config = settings.engine_config()
    (folder,) = settings.model_folders.values()
    backend = load_denoiser(folder, settings.backend, settings.backend_options())
    check(backend.config.model.image_channels, backend.config.model.image_size)
    runner = ArrayRunner(backend, config)
    served = served_model("model", backend, runner.numerics_id)
    images: list[ImageParams] = []
    for fields in split_requests(params, n, MAX_IMAGES, lambda: served.class_names or ()):
        body = GenerateRequest.model_validate(fields)
        images += complete(body, served, str(len(images)), max_row_steps=sys.maxsize).images

    engine = Engine({"model": runner}, config, Metrics())
    engine.warm_up()
    request = GenerationRequest(request_id="cli", model="model", images=tuple(images))
    engine.add(request, time.monotonic())
    pixels: dict[int, Uint8Array] = {}
    done = 0
    with typer.progressbar(length=request.row_steps, label="sampling", file=sys.stderr) as bar:
        while engine.has_work():
            for result in engine.step():
                if result.failure is not None:
                    raise image_failure(images[result.position].image_index, result.failure)
                assert result.pixels is not None  # noqa: S101  # no request is cancelled
                pixels[result.position] = result.pixels
            bar.update(engine.activity.row_steps - done)
            done = engine.activity.row_steps
    return [
        SampledImage(
            seed=p.seed,
            image_index=p.image_index,
            class_index=p.class_index,
            numerics_id=runner.numerics_id,
            pixels=pixels[k],
        )
        for k, p in enumerate(images)
    ]
