"""`iddpm sample`: sample images with a model folder in this process, or at a running service."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import fail
from cli.given_options import (
    CondFile,
    FitName,
    ImageFile,
    LatentFile,
    MaskFile,
    ResampleText,
    StartTimestep,
    Strength,
    given_fields,
)
from cli.sampling_options import (
    CfgScale,
    ClassifierScale,
    Eta,
    Key,
    Respacing,
    SamplerName,
    Steps,
    UpsampleCfgScale,
    UpsampleClassifierScale,
    UpsampleSampler,
    UpsampleSteps,
    Url,
    given,
    upsample_fields,
)

if TYPE_CHECKING:
    from cli.sampled import CheckImages, SampledImage
    from diffusion.config import ImageSize


def sample_command(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for files SEED_INDEX.png, or one file: .png, .webp, .jpg, .npz or .npy."
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, as FOLDER or NAME=FOLDER; for a cascade, two of them. With --url: name of a served "
            "model or cascade; default: the first."
        ),
    ] = None,
    cascade: Annotated[
        str | None,
        typer.Option(help="NAME=BASE+UPSAMPLER: sample with two models, of which the second enlarges images."),
    ] = None,
    url: Url = None,
    key: Key = None,
    class_: Annotated[
        str | None, typer.Option("--class", help="Name or index of the class. Default: drawn from the seed.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, max=100_000, help="Number of images. Default: 1, or one per given image.")
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, max=64, help="With --url: images per request; a service or key may allow fewer.")
    ] = 64,
    steps: Steps = None,
    respacing: Respacing = None,
    sampler: SamplerName = "ancestral",
    eta: Eta = None,
    cfg_scale: CfgScale = None,
    classifier_scale: ClassifierScale = None,
    upsample_steps: UpsampleSteps = None,
    upsample_sampler: UpsampleSampler = None,
    upsample_cfg_scale: UpsampleCfgScale = None,
    upsample_classifier_scale: UpsampleClassifierScale = None,
    image: ImageFile = None,
    mask: MaskFile = None,
    latent: LatentFile = None,
    cond: CondFile = None,
    strength: Strength = None,
    start_timestep: StartTimestep = None,
    resample: ResampleText = None,
    fit: FitName = None,
    clip: Annotated[
        bool, typer.Option("--clip/--no-clip", help="Whether the predicted image is clamped in each step.")
    ] = True,
    dtype: Annotated[
        str, typer.Option(help="uint8, or float32 in the units of the data: with .npz and .npy.")
    ] = "uint8",
    image_format: Annotated[
        str | None,
        typer.Option("--format", help="Of the files in a folder: png, webp, jpeg, npz or npy. Default: png, or npy."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, 0..2^53-1. Default: random.")] = None,
    image_index: Annotated[
        int, typer.Option(min=0, help="Index of the first image, 0..2^32-1. Each image of a seed is reproducible.")
    ] = 0,
) -> None:
    """Sample images in this process, or at a running service.

    The same seed gives the same pixels if the numerics_id is the same.

    In this process, the service's settings in the environment apply (IDDPM_THREADS, IDDPM_MAX_ROWS, ...).
    """
    from pydantic import ValidationError

    from cli.client import ClientError
    from cli.sampled import output_at, refuse_impossible_pictures, write_folder, write_one_file
    from formats.checkpoint_config import describe_validation_error
    from service.errors import ModelError, ServiceError

    try:
        output = output_at(out, image_format, dtype)
        fields = upsample_fields(upsample_steps, upsample_sampler, upsample_cfg_scale, upsample_classifier_scale)
        fields |= given_fields(
            image=image,
            mask=mask,
            latent=latent,
            cond=cond,
            strength=strength,
            start_timestep=start_timestep,
            resample=resample,
            fit=fit,
        ) | given(
            class_=class_,
            steps=steps,
            respacing=respacing,
            sampler=sampler,
            eta=eta,
            cfg_scale=cfg_scale,
            classifier_scale=classifier_scale,
            clip=None if clip else False,
            seed=secrets.randbelow(2**53) if seed is None else seed,
            image_index=image_index,
            # npz supports any number of channels
            format="npz",
            dtype=dtype,
        )
        if n is None and not {"image", "latent", "cond"} & fields.keys():
            n = 1

        def check(channels: int, size: ImageSize) -> None:
            refuse_impossible_pictures(output, channels, size, n or 1)

        def arrived(images: list[SampledImage]) -> None:
            if not output.one_file:
                write_folder(output, images)

        images = _sample(fields, n, at_once, model or [], cascade, url, key, check, arrived)
        ids = sorted({image.numerics_id for image in images})  # several if replicas differ
        typer.echo(f"seed {images[0].seed}, numerics_id {', '.join(ids)}")
        if output.one_file:
            write_one_file(output, images)
        typer.echo(f"wrote {out}" if output.one_file else f"wrote {len(images)} images to {out}")
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ClientError, ModelError, OSError, ValueError) as error:
        fail(str(error))


def _sample(
    params: dict[str, Any],
    n: int | None,
    at_once: int,
    models: list[str],
    cascade: str | None,
    url: str | None,
    key: str | None,
    check: CheckImages,
    arrived: Callable[[list[SampledImage]], object],
) -> list[SampledImage]:
    if url is not None:
        from cli.client import Client
        from cli.sample_remote import sample_remote

        if cascade is not None:
            raise ValueError("--cascade is valid only without --url, where --model names a cascade that is served")
        if len(models) > 1:
            raise ValueError(f"--model: with --url, one name; got {', '.join(models)}")
        with Client(url, key=key) as client:
            params = {**params, "model": models[0]} if models else params
            return sample_remote(client, params, n, at_once, check, arrived)
    if not models:
        fail("--model FOLDER or --url ADDRESS must be given", code=2)
    from cli.sample_local import sample_local

    images = sample_local([Path(model) for model in models], cascade, params, n, check)
    arrived(images)
    return images
