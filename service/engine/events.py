"""What the reader of a request's events is told, in this order of its life. Plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from service.engine.request import ImageResult
from service.errors import GenerationFailed


@dataclass(frozen=True, kw_only=True)
class Queued:
    """Accepted; told at once, and about every second until the first image has taken a step."""

    images_ahead: int
    """Images that come before the request's first one."""
    wait_s: float
    """Predicted, until its first network call."""
    eta_s: float
    """Predicted, until its last image is done; 0 where no step has been timed yet. So in every event."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an image has come: the newest that is known, not every step."""

    position: int
    """Which image of its request."""
    step: int
    """Sampling steps taken."""
    steps: int
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What an image is predicted to become."""

    position: int
    step: int
    steps: int
    eta_s: float
    pixels: npt.NDArray[np.uint8] = field(repr=False)
    """uint8 [H, W, C] of the predicted x0."""


@dataclass(frozen=True, kw_only=True)
class ImageDone:
    """An image has taken its last step."""

    position: int
    eta_s: float
    """0 for the last one."""
    result: ImageResult


@dataclass(frozen=True, kw_only=True)
class ImageFailed:
    """An image ended without pixels; the others of its request go on, unless somebody aborts them."""

    position: int
    error: GenerationFailed


@dataclass(frozen=True, kw_only=True)
class Completed:
    """All images are done. The last event; where an image failed it never comes."""


Event = Queued | Progress | Preview | ImageDone | ImageFailed | Completed
