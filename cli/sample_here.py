"""Sample in this process, with the service's own engine: what the service gives for a seed, this gives too.

It reads the service's settings from the environment: with others, other pixels would be computed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.asking import requests
from cli.sampled import CheckImages, SampledImage

if TYPE_CHECKING:
    from formats.images import Uint8Array
    from service.engine.request import ImageParams


def sample_here(model: Path, asked: dict[str, Any], n: int, check: CheckImages) -> list[SampledImage]:
    """Sample images from a model folder.

    Args:
        model: its folder, as FOLDER or NAME=FOLDER.
        asked: fields of a request, the seed among them.
        n: images.
        check: called when the model is loaded.

    Raises:
        ValidationError: a field, or a setting in the environment, breaks a rule.
        ValueError: a variable in the environment that looks like a setting and is none; also of `check`.
        InvalidRequest: a field breaks a rule of the model.
        ModelError: a model that cannot be run.
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
    settings = Settings(models=(model,), host="127.0.0.1")  # nobody listens
    config = settings.engine_config()
    (folder,) = settings.model_folders.values()
    backend = load_denoiser(folder, settings.backend, settings.backend_options())
    check(backend.config.model.image_channels, backend.config.model.image_size)
    runner, metrics = ArrayRunner(backend, config), Metrics()
    served = served_model("model", backend, runner.numerics_id)
    params: list[ImageParams] = []
    for fields in requests(asked, n, MAX_IMAGES, lambda: served.class_names or ()):
        body = GenerateRequest.model_validate(fields)
        params += complete(body, served, str(len(params)), max_row_steps=sys.maxsize).images

    engine = Engine({"model": runner}, config, metrics)
    engine.warm_up()
    request = GenerationRequest(request_id="cli", model="model", images=tuple(params))
    engine.add(request, time.monotonic())
    pixels: dict[int, Uint8Array] = {}
    done = 0
    with typer.progressbar(length=request.row_steps, label="sampling", file=sys.stderr) as bar:
        while engine.has_work():
            for result in engine.step():
                if result.failure is not None:
                    raise image_failure(params[result.position].image_index, result.failure)
                assert result.pixels is not None  # noqa: S101  # nobody cancels here
                pixels[result.position] = result.pixels
            counted = int(metrics.registry.get_sample_value("iddpm_row_steps_total") or 0)
            bar.update(counted - done)
            done = counted
    return [
        SampledImage(
            seed=p.seed,
            image_index=p.image_index,
            class_index=p.class_index,
            numerics_id=runner.numerics_id,
            pixels=pixels[k],
        )
        for k, p in enumerate(params)
    ]
