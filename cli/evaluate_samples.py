"""`iddpm evaluate samples`: generate images, and score them against real ones."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from cli.errors import fail, needs_extra
from cli.evaluation_options import CondData, DataOptions
from cli.sampling_options import CfgScale, ClassifierScale, Eta, Respacing, SamplerName, Steps, given

if TYPE_CHECKING:
    from cli.local_engine import LocalEngine
    from diffusion.config import CheckpointConfig

SHARD_SIZE = 64
"""Images that are written at a time."""


def samples_command(
    model: Annotated[Path, typer.Argument(help="Model folder: a checkpoint or an artifact.")],
    features: Annotated[
        Path,
        typer.Option(
            help="Network that computes features: .onnx, TorchScript (.pt, .ts: contains code, use only files that you "
            "trust), or torch-fidelity's Inception weights (.pth)."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for samples.npz, results.json, results.md, grid.png.")
    ],
    num: Annotated[int, typer.Option(min=2, help="Number of images.")],
    data: Annotated[
        Path | None, typer.Option(help="Real images to compare with: a data set, as for `iddpm train`.")
    ] = None,
    cond: CondData = None,
    assignments: DataOptions = None,
    reference: Annotated[
        Path | None, typer.Option(help="Instead of --data: reference npz of guided-diffusion's evaluator.")
    ] = None,
    split_baseline: Annotated[
        Path | None, typer.Option(help="Other real images (another split); --num of them are scored like samples.")
    ] = None,
    steps: Steps = None,
    respacing: Respacing = None,
    sampler: SamplerName = "ancestral",
    eta: Eta = None,
    cfg_scale: CfgScale = None,
    classifier_scale: ClassifierScale = None,
    classes: Annotated[
        Literal["balanced", "data"] | None,
        typer.Option(
            help="Classes of the images: equally often, or as often as in --data. Default: balanced; with conditioning "
            "images, those of the images that they belong to."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Seed; image k is image k of this seed.")] = 0,
    features_range: Annotated[
        str, typer.Option(help="Values of black and white in the input of an ONNX or TorchScript network.")
    ] = "-1,1",
    features_channels: Annotated[
        int | None, typer.Option(min=1, help="Channels of a TorchScript network's input; grey images are repeated.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of features of real images. Default: in the user's cache folder.")
    ] = None,
) -> None:
    """Generate images with this project's engine, and score them against real ones.

    Scores: FID, sFID, Inception score, KID, precision and recall, as far as the network's outputs allow.
    If the command was interrupted, the same command continues it. The service's settings in the environment apply.
    """
    with needs_extra("train"):
        from pydantic import ValidationError

        from cli.threads import limit_torch_threads
        from cli.train_command import parse_assignments
        from formats.checkpoint_config import describe_validation_error
        from service.errors import ModelError, ServiceError
        from trainer.evaluation.errors import EvaluationError
        from trainer.evaluation.extractors import open_extractor
        from trainer.evaluation.feature_sets import cache_folder
        from trainer.evaluation.samples import evaluate_samples, refuse_unfit

        limit_torch_threads()

    sampling = given(
        steps=steps,
        respacing=respacing,
        sampler=sampler,
        eta=eta,
        cfg_scale=cfg_scale,
        classifier_scale=classifier_scale,
    )
    try:
        if (data is None) == (reference is None):
            raise EvaluationError("give either --data or --reference")
        if classes == "data" and data is None:
            raise EvaluationError("--classes data needs --data, whose frequencies it takes")
        extractor = open_extractor(features, value_range=read_range(features_range), channels=features_channels)
        generated = generate(
            model, out, num, seed, sampling, classes=classes, data=data, cond=cond,
            reading=parse_assignments(assignments or []),
            check=partial(refuse_unfit, data=data, split_baseline=split_baseline),
        )  # fmt: skip

        evaluate_samples(
            out,
            generated.config,
            extractor,
            data=data,
            reference=reference,
            split_baseline=split_baseline,
            cache=cache or cache_folder(),
            facts={
                "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
                "command": shlex.join(["iddpm", *sys.argv[1:]]),
                "model": str(model),
                "numerics_id": generated.numerics_id,
                "sampling": {
                    **sampling,
                    "seed": seed,
                    "classes": classes or ("data" if generated.conditions else "balanced"),
                },
                **({"conditions": generated.conditions} if generated.conditions else {}),
            },
        )
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (ServiceError, ModelError, OSError, ValueError) as error:
        fail(error)
    typer.echo((out / "results.md").read_text(encoding="utf-8"))


def read_range(text: str) -> tuple[float, float]:
    """Read the option --features-range.

    Raises:
        ValueError: it is not two numbers.
    """
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--features-range must be BLACK,WHITE, for example 0,255; got {text!r}") from error
    return low, high


class Generated(NamedTuple):
    """What was generated."""

    config: CheckpointConfig
    """Of the model, with the options by which real images are read."""
    numerics_id: str
    conditions: dict[str, str | int] | None
    """The data whose images condition the generated ones; None: the model takes no conditioning image."""


def generate(
    model: Path,
    out: Path,
    num: int,
    seed: int,
    sampling: dict[str, Any],
    *,
    classes: Literal["balanced", "data"] | None = None,
    data: Path | None = None,
    cond: Path | None = None,
    reading: Mapping[str, Any] | None = None,
    check: Callable[[CheckpointConfig], None] = lambda _: None,
) -> Generated:
    """Generate the images that are missing in a folder.

    Args:
        model: the model folder.
        out: the folder.
        num: number of images.
        seed: of all images.
        sampling: fields of a request.
        classes: see `samples_command`; None: balanced, or those of the conditioning images.
        data: real images, whose frequencies of classes and conditioning images are taken.
        cond: conditioning images of the data.
        reading: options of the data that differ from those of the model's training, by dotted name.
        check: called with the model's configuration before anything is computed; its exceptions are passed on.
    """
    from cli.bulk import generate_into, produce_here
    from cli.bulk_order import Files, describe_generation
    from cli.local_engine import LocalEngine, local_settings
    from trainer.evaluation.conditions import RealConditions, open_conditions
    from trainer.evaluation.reading import with_reading

    changes = reading or {}
    conditions: RealConditions | None = None

    def check_all(config: CheckpointConfig) -> None:
        nonlocal conditions
        config = with_reading(config, changes)
        guided = bool(sampling.get("classifier_scale"))
        conditions = open_conditions(config, data, cond, num, classes=classes, guided=guided)
        if conditions is not None and changes:  # read otherwise, the same files are other conditioning images
            conditions.description["reading"] = json.dumps(changes, sort_keys=True)
        check(config)

    engine = LocalEngine(local_settings(model), check_all)
    config = with_reading(engine.config, changes)
    generation = describe_generation(
        engine,
        sampling,
        seed=seed,
        image_index=0,
        count=num,
        classes=_classes(engine, config, sampling, num, classes, data) if conditions is None else conditions.labels,
        files=Files("npz", SHARD_SIZE),
        conditions=conditions,
    )
    generate_into(out, generation, produce_here(engine, generation, conditions))
    return Generated(config, engine.numerics_id, generation.conditions)


def _classes(
    engine: LocalEngine,
    config: CheckpointConfig,
    sampling: dict[str, Any],
    num: int,
    classes: str | None,
    data: Path | None,
) -> list[int] | None:
    """Return the classes of images by image index, repeated as often as needed; None if images have no class."""
    from cli.bulk_order import choose_classes
    from trainer.evaluation.reading import open_real
    from trainer.evaluation.sample_files import labels_by_frequency
    from trainer.evaluation.subject import model_labels

    count = config.model.num_classes
    if classes != "data" or data is None or count is None:
        return choose_classes(engine, sampling, None)
    labels = model_labels("the model", config, open_real(data, config, labelled=True))
    assert labels is not None  # noqa: S101  # the model has classes
    return [int(label) for label in labels_by_frequency(num, labels, count)]
