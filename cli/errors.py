"""How a command ends when a user can put things right: one line on standard error, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from diffusion.extras import install_command


def fail(message: object, code: int = 1) -> NoReturn:
    """Print an error in one line and end the command."""
    typer.secho(f"error: {message}", err=True, fg="red")
    raise typer.Exit(code)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """End the command with what to install, if something inside needs a package that is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; this needs: {install_command(extra)}")
