"""`iddpm export`: from a checkpoint to the files of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import fail

FORMATS = ("diffusers",)


def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder to read.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    format_: Annotated[str, typer.Option("--format", help="diffusers: a folder for UNet2DModel.from_pretrained.")],
) -> None:
    """Write a checkpoint in the format of another tool."""
    from model_export.diffusers_export import export_diffusers

    if format_ not in FORMATS:
        fail(f"--format must be one of {', '.join(FORMATS)}; got {format_!r}", code=2)
    try:
        export_diffusers(checkpoint, out)
    except (ValueError, OSError) as error:
        fail(error)
    typer.echo(f"exported: {out}")
