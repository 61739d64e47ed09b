"""How the commands of `iddpm evaluate` that can be continued end before they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from cli.errors import fail

if TYPE_CHECKING:
    from trainer.stop_request import StopRequest


@contextmanager
def evaluation_errors(stop: StopRequest) -> Iterator[None]:
    """End the command with a message if the evaluation is stopped, or fails."""
    from trainer.evaluation.folder import EvaluationStopped

    try:
        yield
    except EvaluationStopped:
        typer.echo("stopped; the same command continues the evaluation", err=True)
        raise typer.Exit(128 + (stop.signal or 0)) from None
    except (ValueError, OSError) as error:
        fail(error)
