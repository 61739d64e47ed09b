"""`iddpm plot`: draw runs and evaluations as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail, needs_extra


def plot_command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs, folders of evaluations, or results.json files of evaluations."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")],
) -> None:
    """Draw runs and evaluations as PNG files.

    Runs: loss by quarter of the timesteps, training. Evaluations: terms of the variational bound, gradient noise scale,
    quality over compute. Evaluations inside the folder of a run are found.
    """
    from formats.atomic_file import write_file

    with needs_extra("train,plots"):
        import matplotlib as mpl

        from trainer.evaluation.collected import collect
        from trainer.evaluation.plots import plots_of

    mpl.use("Agg")
    try:
        found = [collect(run) for run in runs]
        drawn = plots_of(found)
        if not drawn:
            fail("nothing to draw: no log of a run, and no evaluation with a plot")
        out.mkdir(parents=True, exist_ok=True)
        for name, content in drawn.items():
            write_file(out / f"{name}.png", content)
            typer.echo(f"wrote {out / name}.png")
    except (ValueError, OSError) as error:
        fail(error)
