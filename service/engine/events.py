"""The events of a request, as plain dataclasses in the order in which they occur."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.request import ImagePreview, ImageProgress, ImageResult
from service.errors import GenerationFailed


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The request was accepted. Sent at once, then about every second until its first image has taken a step."""

    images_ahead: int
    """Number of images ahead of the request's first image."""
    wait_s: float
    """Predicted seconds until its first network call."""
    eta_s: float
    """Predicted seconds until its last image completes; 0 if no step has been timed. Same meaning in every event."""


@dataclass(frozen=True, kw_only=True)
class ImageDone:
    """An image has taken its last step."""

    position: int
    eta_s: float
    """0 for the last image."""
    result: ImageResult


@dataclass(frozen=True, kw_only=True)
class ImageFailed:
    """An image ended without pixels. The other images of its request continue until they are aborted."""

    position: int
    error: GenerationFailed


@dataclass(frozen=True, kw_only=True)
class Completed:
    """All images have completed. This is the last event; it is not sent if an image failed."""


Event = Queued | ImageProgress | ImagePreview | ImageDone | ImageFailed | Completed
