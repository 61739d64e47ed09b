"""How a command ends when a user can put things right: one line on standard error, and an exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from formats.extras import install_command


def fail(message: object, code: int = 1) -> NoReturn:
    """Print an error in one line and end the command."""
    typer.secho(f"error: {message}", err=True, fg="red")
    raise typer.Exit(code)


@contextmanager
def tidy_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: what is half written is removed on the way out."""

    def leave(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """End the command with what to install, if something inside needs a package that is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; this needs: {install_command(extra)}")
