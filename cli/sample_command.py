"""`iddpm sample`: images from a model folder, in this process, or from a running service."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import fail

if TYPE_CHECKING:
    from cli.sampled import CheckImages, SampledImage


def sample_command(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for SEED_INDEX.png, or a file: .png, .webp, .jpg, .npz.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model folder; with --url the name of a served model, default its first.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask the service there, http://HOST:PORT; /v1 at the end is dropped.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="IDDPM_KEY", help="With --url: the API key.")] = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="Class by name or index; absent: drawn from the seed.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=100_000, help="Images.")] = 1,
    at_once: Annotated[
        int, typer.Option(min=1, max=64, help="With --url: images per request; services and keys may allow less.")
    ] = 64,
    steps: Annotated[int | None, typer.Option(min=2, help="Respaced steps; default 100.")] = None,
    respacing: Annotated[str | None, typer.Option(help="Instead of --steps: '10,10,20,40' or 'ddim25'.")] = None,
    sampler: Annotated[str, typer.Option(help="ancestral or ddim.")] = "ancestral",
    eta: Annotated[float | None, typer.Option(help="Noise of ddim, 0..1; default 0.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Guidance, 1 = off; default: the model's own.")] = None,
    classifier_scale: Annotated[
        float | None, typer.Option(help="Guidance by the model's noisy classifier, 0 = off, the default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="0..2^53-1; absent: random.")] = None,
    image_index: Annotated[
        int, typer.Option(min=0, help="Index of the first image, 0..2^32-1: image k of a seed is always the same.")
    ] = 0,
) -> None:
    """Sample images, here or at a service: the same seed gives the same pixels where the numerics_id is the same.

    Here, settings of the service in the environment (IDDPM_THREADS, IDDPM_MAX_ROWS, ...) are those of this command.
    """
    from pydantic import ValidationError

    from cli.client import ClientError
    from cli.sampled import refuse_impossible_pictures, refuse_other_files, write_images
    from formats.checkpoint_config import describe_validation_error
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
        "image_index": image_index,
    }
    try:
        refuse_other_files(out)

        def check(channels: int, size: int) -> None:
            refuse_impossible_pictures(out, channels, size, n)

        images = _sample({k: v for k, v in asked.items() if v is not None}, n, at_once, model, url, key, check)
        ids = sorted({image.numerics_id for image in images})  # several: replicas that differ
        typer.echo(f"seed {images[0].seed}, numerics_id {', '.join(ids)}")
        write_images(out, images)
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ClientError, ModelError, OSError, ValueError) as error:
        fail(str(error))


def _sample(
    asked: dict[str, Any],
    n: int,
    at_once: int,
    model: str | None,
    url: str | None,
    key: str | None,
    check: CheckImages,
) -> list[SampledImage]:
    if url is not None:
        from cli.client import Client
        from cli.sample_there import sample_there

        with Client(url, key=key) as client:
            return sample_there(client, asked if model is None else {**asked, "model": model}, n, at_once, check)
    if model is None:
        fail("--model FOLDER or --url ADDRESS must be given", code=2)
    from cli.sample_here import sample_here

    return sample_here(Path(model), asked, n, check)
