"""Errors that a user can fix: one line on standard error, and an exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from formats.extras import install_command


def fail(message: object, code: int = 1) -> NoReturn:
    """Print an error in one line and exit with a code."""
    typer.secho(f"error: {message}", err=True, fg="red")
    raise typer.Exit(code)


@contextmanager
def tidy_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit inside, so that incomplete files are removed, as on Ctrl-C."""

    def leave(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """If an import inside fails, end the command with the install command of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; this needs: {install_command(extra)}")
