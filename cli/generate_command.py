"""`iddpm generate`: many images into a folder, for a data set or a score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.errors import fail, needs_extra
from cli.sampling_options import (
    CfgScale,
    ClassifierScale,
    Eta,
    Respacing,
    SamplerName,
    Steps,
    UpsampleCfgScale,
    UpsampleClassifierScale,
    UpsampleSampler,
    UpsampleSteps,
    given,
    upsample_fields,
)


def generate_command(
    model: Annotated[
        list[Path],
        typer.Argument(help="Model folder: a checkpoint, an artifact or an ensemble. For a cascade, two of them."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the images, or one to continue.")],
    cascade: Annotated[
        str | None,
        typer.Option(help="NAME=BASE+UPSAMPLER: generate with two models, of which the second enlarges images."),
    ] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Number of images, of all classes equally often.")] = None,
    per_class: Annotated[int | None, typer.Option(min=1, help="Instead of --num: images of each class.")] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Name or index of a class; can be repeated. Default: all classes."),
    ] = None,
    image_format: Annotated[
        Literal["png", "webdataset", "parquet", "npz"],
        typer.Option(
            "--format",
            help="png: a folder per class. webdataset: tar files. parquet: as Hugging Face's data sets. npz: one file, "
            "as guided-diffusion's evaluator reads it.",
        ),
    ] = "png",
    shard_size: Annotated[
        int, typer.Option(min=1, max=100_000, help="Images that are written together; memory holds four times as many.")
    ] = 1000,
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
    seed: Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Seed of all images.")] = 0,
    image_index: Annotated[
        int, typer.Option(min=0, help="Image index of the first image; other machines can generate other ranges.")
    ] = 0,
) -> None:
    """Generate many images with this project's engine.

    Image k has the pixels that the service returns for its seed, image index and class. The same command continues
    what was interrupted, even by `kill -9`. The service's settings in the environment apply.
    """
    with needs_extra("generate"):
        import tqdm  # noqa: F401  # before the model is loaded

        if image_format == "parquet":
            import pyarrow  # noqa: F401
    from pydantic import ValidationError

    from cli.bulk import Files, choose_classes, describe_generation, generate_into
    from cli.local_engine import LocalEngine
    from formats.checkpoint_config import describe_validation_error
    from service.errors import ModelError, ServiceError

    sampling = given(
        steps=steps,
        respacing=respacing,
        sampler=sampler,
        eta=eta,
        cfg_scale=cfg_scale,
        classifier_scale=classifier_scale,
    ) | upsample_fields(upsample_steps, upsample_sampler, upsample_cfg_scale, upsample_classifier_scale)
    try:
        if (num is None) == (per_class is None):
            raise ValueError("give either --num or --per-class")
        engine = LocalEngine(*model, cascade=cascade)
        chosen = choose_classes(engine, sampling, classes)
        if per_class is not None and chosen is None:
            raise ValueError("--per-class needs a model with classes; use --num")
        generation = describe_generation(
            engine,
            sampling,
            seed=seed,
            image_index=image_index,
            count=num or (per_class or 0) * len(chosen or ()),
            classes=chosen,
            files=Files(image_format, shard_size),
        )
        generate_into(out, engine, generation)
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ModelError, OSError, ValueError) as error:
        fail(error)
    typer.echo(f"{generation.count} images in {out}, numerics_id {generation.numerics_id}")
