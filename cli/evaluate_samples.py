"""`iddpm evaluate samples`: generate images, and score them against real ones."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.errors import fail, needs_extra
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
        Literal["balanced", "data"],
        typer.Option(help="Classes of the images: equally often, or as often as in --data."),
    ] = "balanced",
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
        from formats.checkpoint_config import describe_validation_error
        from service.errors import ModelError, ServiceError
        from trainer.evaluation.errors import EvaluationError
        from trainer.evaluation.extractors import open_extractor
        from trainer.evaluation.feature_sets import cache_folder

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
        config, numerics_id = generate(model, out, num, seed, sampling, classes, data)
        from trainer.evaluation.samples import evaluate_samples

        evaluate_samples(
            out,
            config,
            extractor,
            data=data,
            reference=reference,
            split_baseline=split_baseline,
            cache=cache or cache_folder(),
            facts={
                "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
                "command": shlex.join(["iddpm", *sys.argv[1:]]),
                "model": str(model),
                "numerics_id": numerics_id,
                "sampling": {**sampling, "seed": seed, "classes": classes},
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


def generate(
    model: Path, out: Path, num: int, seed: int, sampling: dict[str, Any], classes: str, data: Path | None
) -> tuple[CheckpointConfig, str]:
    """Generate the images that are missing in a folder; return the model's configuration and numerics_id."""
    from cli.bulk import Files, describe_generation, generate_into, produce_here
    from cli.local_engine import LocalEngine

    engine = LocalEngine(model)
    generation = describe_generation(
        engine,
        sampling,
        seed=seed,
        image_index=0,
        count=num,
        classes=_classes(engine, sampling, num, classes, data),
        files=Files("npz", SHARD_SIZE),
    )
    generate_into(out, generation, produce_here(engine, generation))
    return engine.config, engine.numerics_id


def _classes(
    engine: LocalEngine, sampling: dict[str, Any], num: int, classes: str, data: Path | None
) -> list[int] | None:
    """Return the classes of images by image index, repeated as often as needed; None if images have no class."""
    from cli.bulk import choose_classes
    from trainer.evaluation.feature_sets import open_real
    from trainer.evaluation.sample_files import labels_by_frequency

    count = engine.config.model.num_classes
    if classes == "balanced" or data is None or count is None:
        return choose_classes(engine, sampling, None)
    labels = labels_by_frequency(num, open_real(data, engine.config, labelled=True).labels, count)
    return [int(label) for label in labels]
