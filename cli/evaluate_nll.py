"""`iddpm evaluate nll`: bits/dim of models over a test set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import needs_extra
from cli.evaluation_errors import evaluation_errors
from cli.evaluation_options import CondData, DataOptions


def nll_command(
    models: Annotated[list[Path], typer.Argument(help="Checkpoint or ensemble folders to compare on the same images.")],
    data: Annotated[Path, typer.Option(help="Test images: an npz file, or a folder with one subfolder per class.")],
    out: Annotated[Path, typer.Option(help="Folder for results; the same command continues what was interrupted.")],
    cond: CondData = None,
    assignments: DataOptions = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Evaluate on this many evenly spaced timesteps. Default: the full chain.")
    ] = None,
    respacing: Annotated[
        str | None, typer.Option(help='Instead of --steps: "10,10,20" per section, or "ddimN".')
    ] = None,
    extra_steps: Annotated[
        bool,
        typer.Option(
            "--extra-steps", help="Add every timestep below T / steps, which tightens the bound (IDDPM, appendix E)."
        ),
    ] = False,
    num: Annotated[int, typer.Option(min=1, help="Number of images, chosen at random.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a network call.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Seed of the noise and of the choice of images.")] = 0,
    plot: Annotated[bool, typer.Option("--plot", help="Also draw the terms per timestep: vlb_terms.png.")] = False,
) -> None:
    """Evaluate the variational bound in bits/dim, with standard errors.

    Prints a table and writes results.json: the terms of the bound per timestep, the prior and the total. Ctrl-C ends
    the command after the current block of images.
    """
    with needs_extra("train"):
        import torch
        from tqdm import tqdm

        from cli.threads import limit_torch_threads
        from cli.train_command import parse_assignments
        from formats.atomic_file import write_file
        from trainer.evaluation.collected import RESULTS_FILE, Results
        from trainer.evaluation.errors import EvaluationError
        from trainer.evaluation.folder import evaluation_folder
        from trainer.evaluation.nll import NllOptions, evaluate_nll, inputs_of
        from trainer.evaluation.nll_report import summarise, table
        from trainer.evaluation.plots import vlb_terms
        from trainer.evaluation.reading import open_inputs, with_reading
        from trainer.evaluation.subject import distinct_names, load_subject
        from trainer.provenance import git_commit
        from trainer.stop_request import StopRequest

        limit_torch_threads()
    if plot:
        with needs_extra("plots"):
            import matplotlib  # noqa: F401  # before hours of evaluation

    stop = StopRequest()
    with evaluation_errors(stop):
        if steps is not None and respacing is not None:
            raise EvaluationError("--steps and --respacing exclude each other")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        subjects = [load_subject(folder, device) for folder in models]
        shapes = {subject.image_shape for subject in subjects}
        if len(shapes) > 1:
            raise EvaluationError(f"models must have images of one shape; got {sorted(shapes)}")
        labelled = any(subject.config.model.num_classes is not None for subject in subjects)
        changes = parse_assignments(assignments or [])
        configs = [with_reading(subject.config, changes) for subject in subjects]
        dataset, reading = open_inputs(data, configs, cond, labelled=labelled)
        typer.echo(dataset.summary, err=True)
        spec = str(steps) if steps is not None else respacing or ""
        settings = {
            "kind": "nll",
            "data": dataset.description,
            "reading": reading.model_dump(mode="json"),
            "respacing": spec,
            "extra_steps": extra_steps,
            "seed": seed,
        }
        options = NllOptions(
            respacing=spec,
            extra_steps=extra_steps,
            images=min(num, len(dataset.labels)),
            seed=seed,
            batch_size=batch_size,
        )
        for subject in subjects:
            inputs_of(subject, dataset)  # refuses data that do not fit
            options.process_of(subject)  # refuses a respacing that its chain does not have
        results = {}
        with evaluation_folder(out, settings), stop.on_signals():
            for name, subject in zip(distinct_names(subjects), subjects, strict=True):
                total = options.images * options.steps_of(subject)
                with tqdm(total=total, desc=name, unit="row", dynamic_ncols=True, file=sys.stderr) as bar:
                    file = out / f"{subject.sha256[:16]}.f32"
                    results[name] = evaluate_nll(subject, dataset, options, file, advance=bar.update, stop=stop)
            summaries = summarise(results)
            for summary, subject in zip(summaries, subjects, strict=True):
                summary["sha256"] = subject.sha256
            content = {
                "format_version": 1,
                **settings,
                "images": options.images,
                "torch": torch.__version__,
                "commit": git_commit(),
                "models": summaries,
            }
            write_file(out / RESULTS_FILE, (json.dumps(content, indent=1) + "\n").encode())
            if plot:
                write_file(out / "vlb_terms.png", vlb_terms([Results(path=out / RESULTS_FILE, content=content)]))
    typer.echo(table(summaries))
    typer.echo(f"{options.images} images; written: {out / 'results.json'}", err=True)
