"""`iddpm evaluate noise-scale`: the gradient noise scale of checkpoints."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import needs_extra
from cli.evaluation_errors import evaluation_errors
from cli.evaluation_options import CondData, DataOptions


def noise_scale_command(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    data: Annotated[Path, typer.Option(help="Training images: an npz file, or a folder with one subfolder per class.")],
    out: Annotated[Path, typer.Option(help="Folder for results; the same command continues what was interrupted.")],
    cond: CondData = None,
    assignments: DataOptions = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            help="LOSS:SAMPLER with simple, hybrid, vlb and uniform, loss_second_moment. Can be repeated. "
            "Default: the loss that the model was trained with and vlb, uniform, and vlb:loss_second_moment.",
        ),
    ] = None,
    small: Annotated[int, typer.Option(min=1, help="Images of the small batch, and of a network call.")] = 16,
    big: Annotated[int, typer.Option(min=2, help="Images of the big batch, a multiple of the small one.")] = 256,
    batches: Annotated[int, typer.Option(min=2, help="Big batches per case; more make the standard errors less.")] = 16,
    history: Annotated[
        int, typer.Option(min=1, help="Losses per timestep for the importance weights; training uses 10.")
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Seed of images, timesteps and noise.")] = 0,
) -> None:
    """Measure how noisy the gradient is: by objective and by the sampler of timesteps (figures 6 and 7 of the paper).

    Prints a table and writes results.json.
    """
    with needs_extra("train"):
        import torch
        from tqdm import tqdm

        from cli.threads import limit_torch_threads
        from cli.train_command import parse_assignments
        from formats.atomic_file import write_file
        from trainer.evaluation.collected import RESULTS_FILE
        from trainer.evaluation.folder import evaluation_folder
        from trainer.evaluation.gradient_noise import (
            Case,
            GradientNoise,
            NoiseOptions,
            TrainedObjective,
            usual_cases,
        )
        from trainer.evaluation.gradient_noise_report import summarise, table
        from trainer.evaluation.reading import open_inputs, with_reading
        from trainer.evaluation.subject import load_subject
        from trainer.provenance import git_commit
        from trainer.stop_request import StopRequest

        limit_torch_threads()

    stop = StopRequest()
    with evaluation_errors(stop):
        options = NoiseOptions(small=small, big=big, batches=batches, history=history, seed=seed)
        subject = load_subject(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        wanted = [Case.parse(case) for case in cases] if cases else usual_cases(subject)
        labelled = subject.config.model.num_classes is not None
        config = with_reading(subject.config, parse_assignments(assignments or []))
        dataset, reading = open_inputs(data, [config], cond, labelled=labelled)
        typer.echo(dataset.summary, err=True)
        settings = {
            "kind": "noise-scale",
            "model": subject.sha256,
            "data": dataset.description,
            "reading": reading.model_dump(mode="json"),
            "small": small,
            "big": big,
            "history": history,
            "seed": seed,
            **TrainedObjective.of(subject.config).settings,
        }
        noise = GradientNoise(subject, dataset, options)
        bar_of = partial(tqdm, unit="img", dynamic_ncols=True, file=sys.stderr)
        found = {}
        with evaluation_folder(out, settings), stop.on_signals():
            for case in dict.fromkeys(wanted):
                sampler = None
                if case.sampler == "loss_second_moment":
                    with bar_of(total=noise.rows_of_history, desc="importance weights") as bar:
                        sampler = noise.importance(out / "history.f32", bar.update, stop)
                with bar_of(total=batches * big, desc=str(case)) as bar:
                    file = out / f"{case.loss}-{case.sampler}.f32"
                    found[case] = noise.measure(case, sampler, file, bar.update, stop)
            summaries = summarise(found)
            content = {
                "format_version": 1,
                **settings,
                "name": subject.name,
                "images_seen": subject.config.provenance.get("images_seen"),
                "batches": batches,
                "torch": torch.__version__,
                "commit": git_commit(),
                "cases": summaries,
            }
            write_file(out / RESULTS_FILE, (json.dumps(content, indent=1) + "\n").encode())
    typer.echo(table(summaries))
    typer.echo(f"written: {out / 'results.json'}", err=True)
