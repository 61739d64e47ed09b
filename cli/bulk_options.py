"""The options of commands that generate many images: which images, and how they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Models = Annotated[
    list[Path],
    typer.Argument(help="Model folder: a checkpoint, an artifact or an ensemble. For a cascade, two of them."),
]
Cascade = Annotated[
    str | None, typer.Option(help="NAME=BASE+UPSAMPLER: generate with two models, of which the second enlarges images.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder for the images, or one to continue.")]
Num = Annotated[int | None, typer.Option(min=1, help="Number of images, of all classes equally often.")]
PerClass = Annotated[int | None, typer.Option(min=1, help="Instead of --num: images of each class.")]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", help="Name or index of a class; can be repeated. Default: all classes."),
]
Format = Annotated[
    Literal["png", "webdataset", "parquet", "npz"],
    typer.Option(
        "--format",
        help="png: a folder per class. webdataset: tar files. parquet: as Hugging Face's data sets. npz: one file, "
        "as guided-diffusion's evaluator reads it.",
    ),
]
ShardSize = Annotated[
    int, typer.Option(min=1, max=100_000, help="Images that are written together; memory holds four times as many.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**53 - 1, help="Seed of all images.")]
FirstIndex = Annotated[
    int, typer.Option(min=0, help="Image index of the first image; other machines can generate other ranges.")
]
