"""`iddpm evaluate report`: one HTML page about a run or about evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail, needs_extra


def report_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of evaluations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")],
) -> None:
    """Write one HTML page with results, plots, sample grids, commands and configuration; it needs no network.

    Evaluations in folders inside the run's folder are included.
    """
    with needs_extra("train,plots"):
        import matplotlib as mpl

        from trainer.evaluation.collected import collect
        from trainer.evaluation.report import write_report

    mpl.use("Agg")
    try:
        write_report(out, collect(run))
    except (ValueError, OSError) as error:
        fail(error)
    typer.echo(f"wrote {out}")
