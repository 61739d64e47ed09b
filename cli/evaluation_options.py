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

DataOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Read the images with another option than in the model's training, data.NAME=VALUE: for example "
        "data.unreadable=skip, or data.image_column of a Hugging Face data set. Can be repeated.",
    ),
]
