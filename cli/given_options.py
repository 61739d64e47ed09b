"""The options of given images: their files are read, and the rules between them checked, before a model is loaded."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import typer

ImageFile = Annotated[
    Path | None,
    typer.Option(
        help="Image to begin with, or of which a part is kept: PNG, WebP, JPEG, npy or npz. An array of shape "
        "[n, height, width, channels] has one per image."
    ),
]
MaskFile = Annotated[
    Path | None,
    typer.Option(help="With --image: white (or 1) where it is made anew, black (or 0) where it is kept; a file."),
]
LatentFile = Annotated[
    Path | None,
    typer.Option(help="Instead of --image: x_t to begin with, float32, npy or npz, as `iddpm encode` writes it."),
]
CondFile = Annotated[
    Path | None,
    typer.Option(help="Conditioning image of a model that takes one; for an upsampler, the small picture. A file."),
]
Strength = Annotated[
    float | None, typer.Option(help="With --image: part of the steps that is taken, 0..1; 1: from noise alone.")
]
StartTimestep = Annotated[
    int | None,
    typer.Option(help="With --image or --latent: t of the training chain to begin at; the nearest step is taken."),
]
ResampleText = Annotated[
    str | None,
    typer.Option("--resample", metavar="TIMES,JUMP", help="With --mask: RePaint's resampling, e.g. '5,10'."),
]
FitName = Annotated[
    str | None,
    typer.Option(
        help="Changes an image, mask and conditioning image of another shape: {fits}. Default: they are refused."
    ),
]


def given_fields(
    *,
    image: Path | None = None,
    mask: Path | None = None,
    latent: Path | None = None,
    cond: Path | None = None,
    strength: float | None = None,
    start_timestep: int | None = None,
    resample: str | None = None,
    fit: str | None = None,
) -> dict[str, Any]:
    """Return the fields of a request for the options that were given; files become base64.

    Raises:
        ValidationError: a value is out of range.
        InvalidRequest: an option needs another one, or excludes it.
        ValueError: --resample is not two integers, or a path is not that of a file.
        OSError: a file cannot be read.
    """
    from service.requests.generate_request import GivenOptions
    from service.requests.given import check_given

    files = {"image": image, "mask": mask, "latent": latent, "cond": cond}
    options = {
        "strength": strength,
        "start_timestep": start_timestep,
        "resample": None if resample is None else _read_resample(resample),
        "fit": fit,
    }
    # The rules between the options are checked before a file is read
    names = {name: str(path) for name, path in files.items() if path is not None}
    check_given(GivenOptions.model_validate({**names, **options}))
    contents = {name: read_base64(name, path) for name, path in files.items() if path is not None}
    return contents | {name: value for name, value in options.items() if value is not None}


def read_base64(option: str, path: Path) -> str:
    """Return the content of an option's file in base64.

    Raises:
        ValueError: the path is not that of a file with content.
        OSError: it cannot be read.
    """
    if not path.is_file():  # a device or a pipe may have no end
        raise ValueError(f"--{option}: {path} is {'not a file' if path.exists() else 'not there'}")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"--{option}: {path} is empty")
    return base64.b64encode(content).decode()


def _read_resample(text: str) -> dict[str, int]:
    try:
        times, jump = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--resample: must be TIMES,JUMP, two integers, for example 5,10; got {text!r}") from error
    return {"times": times, "jump": jump}
