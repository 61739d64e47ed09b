"""Options that the commands of `iddpm evaluate` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CondData = Annotated[
    Path | None,
    typer.Option(
        help="Conditioning images of --data for a model that takes some (model.cond_channels), as for `iddpm train`. "
        "Default: array `cond` of the npz file."
    ),
]
