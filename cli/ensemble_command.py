"""`iddpm ensemble`: combine networks of one process, each for some timesteps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail, tidy_on_sigterm


def ensemble_command(
    out: Annotated[Path, typer.Argument(help="Ensemble folder to write.")],
    ranges: Annotated[
        list[str],
        typer.Option(
            "--range",
            help="FIRST:END=MODEL, timesteps from FIRST up to but excluding END, as a Python slice: negative numbers "
            "count from T, an absent one is 0 or T. Repeat it until all timesteps are covered.",
        ),
    ],
) -> None:
    """Write an ensemble: a model whose networks are used at different timesteps (IDDPM, appendix D).

    For example `iddpm ensemble models/both --range :100=vlb --range 100:-100=hybrid --range=-100:=vlb`. The models are
    copied. Sample, serve and evaluate the folder like any model.
    """
    from formats.ensemble import EnsembleError, write_ensemble

    try:
        parsed = [parse_range(text) for text in ranges]
        with tidy_on_sigterm():
            ensemble = write_ensemble(out, parsed)
    except (EnsembleError, ValueError, OSError) as error:
        fail(error)
    counts = [int((ensemble.network_of == index).sum()) for index in range(len(ensemble.members))]
    parts = ", ".join(f"{name} at {count} timesteps" for name, count in zip(ensemble.members, counts, strict=True))
    typer.echo(f"written: {out} ({parts})")


def parse_range(text: str) -> tuple[int, int, Path]:
    """Return (first, end, folder) of "FIRST:END=FOLDER"; an absent end is 0, which means T.

    Raises:
        ValueError: the text has another form.
    """
    match = re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?=(.+)", text)
    if match is None:
        raise ValueError(f"--range takes FIRST:END=MODEL; got {text!r}")
    return int(match[1] or 0), int(match[2] or 0), Path(match[3])
