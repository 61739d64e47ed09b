"""Every: actions of a run that recur after a number of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.run_folder import warn


@dataclass(frozen=True)
class Every:
    """An action that is due after every so many images, and at the end of the run."""

    images: int
    action: Callable[[], object]
    start: int = 0
    """Images from which on the intervals count."""
    at_end: bool = True

    def run_if_due(self, before: int, after: int, *, done: bool) -> None:
        """Run the action if an interval ended between two numbers of images.

        Args:
            before: images before the last step.
            after: images after it.
            done: whether the run ends with it.
        """
        crossed = (after - self.start) // self.images > (before - self.start) // self.images
        if crossed or (done and self.at_end):
            self.action()


def or_warn(what: str, action: Callable[[], object]) -> None:
    """Run an action that a run does not depend on; if it fails, print a warning and continue."""
    try:
        action()
    except OSError as error:
        warn(f"no {what}: {error.filename}: {error.strerror}")
    except Exception as error:  # e.g. memory, a font: the checkpoint is written, and the run must continue
        warn(f"no {what}: {str(error) or type(error).__name__}")
