"""How a command ends when a user can put things right: one line on standard error, and an exit code."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(message: object, code: int = 1) -> NoReturn:
    """Print an error in one line and end the command."""
    typer.secho(f"error: {message}", err=True, fg="red")
    raise typer.Exit(code)
