"""`iddpm sample`: images from a model folder, in this process, without a server."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import fail
from service.engine.request import GenerationRequest, ImageParams

if TYPE_CHECKING:
    from diffusion.images import Uint8Array
    from service.api.schemas import ImageFormat


def sample_command(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Folder for SEED_INDEX.png files, or a file: .png, .webp (grid) or .npz.")],
    class_: Annotated[
        str | None, typer.Option("--class", help="Class by name or index; absent: drawn from the seed.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=100_000, help="Images.")] = 1,
    steps: Annotated[int | None, typer.Option(min=2, help="Respaced steps; default 100.")] = None,
    respacing: Annotated[str | None, typer.Option(help="Instead of --steps: '10,10,20,40' or 'ddim25'.")] = None,
    sampler: Annotated[str, typer.Option(help="ancestral or ddim.")] = "ancestral",
    eta: Annotated[float | None, typer.Option(help="Noise of ddim, 0..1; default 0.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Guidance, 1 = off; default: the model's own.")] = None,
    classifier_scale: Annotated[
        float | None, typer.Option(help="Guidance by the model's noisy classifier, 0 = off, the default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="0..2^53-1; absent: random.")] = None,
) -> None:
    """Sample images; the same seed gives the pixels that the service gives for it."""
    from pydantic import ValidationError

    from diffusion.checkpoint_config import describe_validation_error
    from service.errors import ModelError, ServiceError

    asked = {
        "class": class_,
        "steps": steps,
        "respacing": respacing,
        "sampler": sampler,
        "eta": eta,
        "cfg_scale": cfg_scale,
        "classifier_scale": classifier_scale,
        "seed": secrets.randbelow(2**53) if seed is None else seed,
    }
    try:
        images = _sample(model, {name: value for name, value in asked.items() if value is not None}, n)
        _write(out, images)
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ModelError, OSError, ValueError) as error:
        fail(str(error))


def _sample(folder: Path, asked: dict[str, Any], n: int) -> list[tuple[ImageParams, Uint8Array]]:
    """Run the service's own engine, without the server: what it gives for a seed, this gives too."""
    from service.api.schemas import MAX_IMAGES, GenerateRequest
    from service.api.translate import ServedModel, complete
    from service.backends.base import BackendOptions
    from service.backends.select import load_denoiser
    from service.engine.config import EngineConfig
    from service.engine.engine import Engine
    from service.engine.request import ImageStatus
    from service.engine.runners.array_runner import ArrayRunner
    from service.metrics import Metrics

    config = EngineConfig()
    backend = load_denoiser(folder, "auto", BackendOptions(max_rows=config.max_rows))
    served = ServedModel(
        name="model",
        config=backend.config,
        numerics_id=backend.numerics_id,
        backend=backend.description,
        classifier=None if backend.classifier is None else backend.classifier.config,
    )
    if asked.get("class", "").isdigit() and asked["class"] not in (served.class_names or ()):
        asked["class"] = int(asked["class"])
    params: list[ImageParams] = []
    while len(params) < n:
        chunk = {"n": min(MAX_IMAGES, n - len(params)), "image_index": len(params)}
        body = GenerateRequest.model_validate({**asked, **chunk})
        params += complete(body, served, str(len(params)), max_row_steps=sys.maxsize).images

    config = config.with_room_for(backend.config.diffusion.num_timesteps)
    runner, metrics = ArrayRunner(backend, config), Metrics()
    engine = Engine({"model": runner}, config, metrics)
    engine.warm_up()
    request = GenerationRequest(request_id="cli", model="model", images=tuple(params))
    engine.add(request, time.monotonic())
    pixels: dict[int, Uint8Array] = {}
    done = 0
    with typer.progressbar(length=request.row_steps, label="sampling", file=sys.stderr) as bar:
        while engine.has_work():
            for result in engine.step():
                if result.status is not ImageStatus.DONE or result.pixels is None:
                    raise ValueError(f"image {params[result.position].image_index}: its numbers overflowed")
                pixels[result.position] = result.pixels
            counted = int(metrics.registry.get_sample_value("iddpm_row_steps_total") or 0)
            bar.update(counted - done)
            done = counted
    typer.echo(f"seed {params[0].seed}, numerics_id {runner.numerics_id}")
    return [(p, pixels[k]) for k, p in enumerate(params)]


def _write(out: Path, images: list[tuple[ImageParams, Uint8Array]]) -> None:
    """Write one file per image into a folder, or all into one .png or .npz."""
    import numpy as np

    from diffusion.images import encode
    from service.api.encoding import encode_picture

    one_file: dict[str, ImageFormat] = {".png": "png", ".webp": "webp", ".npz": "npz"}
    if (image_format := one_file.get(out.suffix.lower())) is not None:
        labels = [params.class_index for params, _ in images]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode_picture(np.stack([pixels for _, pixels in images]), labels, image_format))
        typer.echo(f"wrote {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for params, pixels in images:
        (out / f"{params.seed}_{params.image_index}.png").write_bytes(encode(pixels))
    typer.echo(f"wrote {len(images)} images to {out}")
