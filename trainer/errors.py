"""How a run fails when a user can put things right."""

from __future__ import annotations

from collections.abc import Sequence


class TrainError(ValueError):
    """A run that cannot start, or ended early; the message says why.

    Attributes:
        resume_with: the fields to change, as `--set` takes them, when the run is resumed; None: it cannot be.
    """

    def __init__(self, message: str, *, resume_with: Sequence[str] | None = None) -> None:
        super().__init__(message)
        self.resume_with = resume_with


class Stopped(Exception):
    """A run that ended because it was asked to; what it had trained is in its newest checkpoint."""

    def __init__(self, images_seen: int) -> None:
        self.images_seen = images_seen
        super().__init__(f"stopped after {images_seen} images")
