"""Errors of a run that a user can correct."""

from __future__ import annotations

from collections.abc import Sequence


class TrainError(ValueError):
    """The run cannot start, or ended early; the message gives the reason.

    Attributes:
        resume_with: fields to change on resume, in the form of `--set`; None: the run cannot be resumed.
    """

    def __init__(self, message: str, *, resume_with: Sequence[str] | None = None) -> None:
        super().__init__(message)
        self.resume_with = resume_with


class Stopped(Exception):
    """The run was stopped by a request; its newest checkpoint contains its progress."""

    def __init__(self, images_seen: int) -> None:
        self.images_seen = images_seen
        super().__init__(f"stopped after {images_seen} images")


class Diverged(Exception):
    """The network or its gradient shows that the run has diverged; the message gives the reason."""
