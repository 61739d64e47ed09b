"""`iddpm study`: experiments over several training runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import fail, needs_extra

if TYPE_CHECKING:
    from trainer.evaluation.extractors import Extractor

study_app = typer.Typer(no_args_is_help=True, help="Experiments over several training runs.")


@study_app.callback()
def study() -> None:
    """Experiments over several training runs."""


@study_app.command("scaling")
def scaling_command(
    preset: Annotated[
        str, typer.Argument(help="Configuration whose width and learning rate the others are scaled from.")
    ],
    data: Annotated[Path, typer.Option(help="Images to train on, as for `iddpm train`.")],
    reference: Annotated[Path, typer.Option(help="Real images to compare samples with: another split.")],
    features: Annotated[Path, typer.Option(help="Network that computes features, as for `iddpm evaluate samples`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study.")],
    images: Annotated[int, typer.Option(min=1, help="Training images per width.")],
    widths: Annotated[str, typer.Option(help="Channels of the first level, separated by commas.")] = "16,32,64,96",
    points: Annotated[
        int,
        typer.Option(min=1, max=20, help="Evaluations per width, each after twice as many images as the one before."),
    ] = 4,
    num: Annotated[int, typer.Option(min=2, help="Images generated per evaluation.")] = 1000,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 50,
    nll_images: Annotated[
        int, typer.Option(min=0, help="Images of --reference whose bits/dim are evaluated too; 0: none.")
    ] = 0,
    nll_steps: Annotated[
        int | None, typer.Option(min=2, help="Steps of the respaced chain for bits/dim. Default: the full chain.")
    ] = None,
    nll_extra_steps: Annotated[
        bool, typer.Option("--nll-extra-steps", help="Add the steps of appendix E, as for `iddpm evaluate nll`.")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Set a field of the configuration, NAME=VALUE. Can be repeated.")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Distance of perfect samples, a constant of the power law. Default: that of --num real images."
        ),
    ] = None,
    features_range: Annotated[str, typer.Option(help="As for `iddpm evaluate samples`.")] = "-1,1",
    features_channels: Annotated[int | None, typer.Option(min=1, help="As for `iddpm evaluate samples`.")] = None,
    cache: Annotated[Path | None, typer.Option(help="As for `iddpm evaluate samples`.")] = None,
) -> None:
    """Measure quality over training compute for several widths, as figure 10 of Improved DDPM.

    Writes results.json, results.md and quality_over_compute.png, anew after each evaluation. An interrupted command is
    continued by the same command; --widths may then be others.
    """
    with needs_extra("train,plots"):
        import matplotlib as mpl
        import torch
        from pydantic import ValidationError
        from tqdm import tqdm

        from cli.evaluate_samples import generate, read_range
        from cli.threads import limit_torch_threads
        from cli.train_command import parse_assignments
        from formats.atomic_file import write_file
        from formats.checkpoint_config import describe_validation_error
        from service.errors import ModelError, ServiceError
        from trainer.data import open_dataset
        from trainer.decided import refuse_overruled, split_decided
        from trainer.errors import Stopped, TrainError
        from trainer.evaluation.extractors import open_extractor
        from trainer.evaluation.feature_sets import cache_folder
        from trainer.evaluation.folder import EvaluationStopped
        from trainer.evaluation.nll import NllOptions, evaluate_nll
        from trainer.evaluation.plots import quality_over_compute
        from trainer.evaluation.samples import evaluate_samples
        from trainer.evaluation.scaling import refuse_unfit
        from trainer.evaluation.scaling import study as run_study
        from trainer.evaluation.scaling_report import scaling_page
        from trainer.evaluation.subject import load_subject
        from trainer.loop import resolve
        from trainer.presets import preset as named_preset
        from trainer.stop_request import StopRequest

    mpl.use("Agg")
    limit_torch_threads()
    if not nll_images and (nll_extra_steps or nll_steps is not None):
        option = "--nll-extra-steps" if nll_extra_steps else "--nll-steps"
        fail(f"{option} needs --nll-images of at least 1: without, no bits/dim are evaluated")
    stop = StopRequest()
    command = shlex.join(["iddpm", *sys.argv[1:]])
    kept = cache or cache_folder()
    try:
        extractor = open_extractor(features, value_range=read_range(features_range), channels=features_channels)
        free, decided = split_decided(parse_assignments(assignments or []))
        base = named_preset(preset).with_overrides(free)
        refuse_unfit(base)
        opened = partial(
            open_dataset, image_size=base.model.image_size, channels=base.model.image_channels, options=base.data,
            labelled=base.class_conditional,
        )  # fmt: skip
        dataset = opened(data)
        resolved = resolve(base, dataset)
        refuse_overruled(decided, resolved, dataset)
        test = opened(reference) if nll_images else None
        typer.echo(dataset.summary, err=True)
        constant = limit if limit is not None else _real_distance(data, reference, resolved, num, extractor, kept)

        def evaluate(model: Path, folder: Path) -> Mapping[str, float]:
            generated = generate(model, folder, num, 0, {"steps": steps})
            facts: dict[str, Any] = {"date": "", "command": command, "model": str(model)}
            facts["numerics_id"] = generated.numerics_id
            facts["sampling"] = {"steps": steps, "seed": 0}
            results = evaluate_samples(
                folder,
                generated.config,
                extractor,
                data=reference,
                reference=None,
                split_baseline=None,
                cache=kept,
                facts=facts,
            )
            names = ("frechet_distance", "precision", "recall")
            measured = {name: results["results"][0][name] for name in names}
            if test is not None:
                subject = load_subject(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
                options = NllOptions(
                    respacing="" if nll_steps is None else str(nll_steps),
                    extra_steps=nll_extra_steps,
                    images=min(nll_images, len(test.labels)),
                )
                rows = options.images * options.steps_of(subject)
                with tqdm(total=rows, desc="bits/dim", unit="row", leave=False) as bar:
                    terms = evaluate_nll(subject, test, options, folder / "nll.f32", advance=bar.update, stop=stop)
                measured["bits_per_dim"] = float(terms.total_bpd.mean())
            return measured

        def show(results: Mapping[str, Any]) -> None:
            write_file(out / "results.md", scaling_page(results).encode())
            write_file(out / "quality_over_compute.png", quality_over_compute(results))

        with stop.on_signals():
            results = run_study(
                base,
                dataset,
                out,
                widths=[int(width) for width in widths.split(",")],
                images=images,
                count=points,
                evaluate=evaluate,
                limits={"frechet_distance": constant},
                settings={
                    "num": num,
                    "steps": steps,
                    "features": extractor.description,
                    "reference": reference.name,
                    **({"nll_images": nll_images, "nll_steps": nll_steps} if nll_images else {}),
                    **({"nll_extra_steps": True} if nll_extra_steps else {}),
                },
                rows=num * steps + nll_images * (nll_steps or base.diffusion.num_timesteps),
                show=show,
                command=command,
                stop=stop,
            )
        show(results)
    except ValidationError as error:
        fail(describe_validation_error(error))
    except (Stopped, EvaluationStopped):
        typer.echo("stopped; the same command continues the study", err=True)
        raise typer.Exit(128 + (stop.signal or 0)) from None
    except (TrainError, ServiceError, ModelError, OSError, ValueError) as error:
        fail(error)
    typer.echo(f"wrote results.json, results.md and quality_over_compute.png to {out}")


def _real_distance(data: Path, reference: Path, resolved: Any, num: int, extractor: Extractor, cache: Path) -> float:
    """Return the Fréchet distance of real training images to the reference."""
    import numpy as np

    from diffusion.config import CheckpointConfig
    from trainer.evaluation.feature_sets import dataset_features, dataset_reference
    from trainer.evaluation.metrics import frechet_distance_of, moments
    from trainer.evaluation.reading import open_real

    config = CheckpointConfig(
        model=resolved.model,
        diffusion=resolved.diffusion,
        provenance={"train_config": resolved.model_dump(mode="json")},
    )
    count = len(open_real(data, config).labels)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:num])
    real = dataset_features(data, config, extractor, cache, chosen)
    return frechet_distance_of(dataset_reference(reference, config, extractor, cache).moments, moments(real.features))
