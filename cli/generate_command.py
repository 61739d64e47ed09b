"""`iddpm generate`: many images into a folder, for a data set or a score."""

from __future__ import annotations

import typer

from cli.bulk_options import Cascade, Classes, FirstIndex, Format, Models, Num, Out, PerClass, Seed, ShardSize
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
    model: Models,
    out: Out,
    cascade: Cascade = None,
    num: Num = None,
    per_class: PerClass = None,
    classes: Classes = None,
    image_format: Format = "png",
    shard_size: ShardSize = 1000,
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
    seed: Seed = 0,
    image_index: FirstIndex = 0,
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

    from cli.bulk import generate_into, produce_here
    from cli.bulk_order import Files, Order, describe_order
    from cli.local_engine import LocalEngine, local_settings
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
        order = Order(
            sampling=sampling,
            num=num,
            per_class=per_class,
            classes=classes,
            seed=seed,
            image_index=image_index,
            files=Files(image_format, shard_size),
        )
        engine = LocalEngine(local_settings(*model, cascade=cascade))
        generation = describe_order(engine, order)
        generate_into(out, generation, produce_here(engine, generation))
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ModelError, OSError, ValueError) as error:
        fail(error)
    typer.echo(f"{generation.count} images in {out}, numerics_id {generation.numerics_id}")
