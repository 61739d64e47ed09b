"""What crosses between API and engine: plain dataclasses. No torch, no HTTP."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from diffusion.plans import Sampler


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """What determines a sampling plan, for a given model; images that share it share the plan's lines."""

    sampler: Sampler
    spec: str
    """Respacing, see `diffusion.respacing.space_timesteps`."""
    eta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ImageParams:
    """What determines one image's pixels, for a given model."""

    plan: PlanKey
    num_steps: int
    """Network calls the plan takes."""
    seed: int
    image_index: int
    class_index: int | None
    """None for an unconditional model."""
    cfg_scale: float = 1.0

    @property
    def rows(self) -> int:
        """Network rows per step: two with classifier-free guidance."""
        return 1 if self.cfg_scale == 1.0 else 2


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call of a client, checked and complete: n images of one model."""

    request_id: str
    model: str
    images: tuple[ImageParams, ...]

    @property
    def row_steps(self) -> int:
        """Work: rows times steps."""
        return sum(image.rows * image.num_steps for image in self.images)


class ImageStatus(enum.Enum):
    """Where an image is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


@dataclass(eq=False, kw_only=True)
class Image:
    """An image in flight. The scheduler writes everything below `sequence`."""

    request_id: str
    position: int
    """Which image of its request."""
    model: str
    params: ImageParams
    submitted_at: float
    """time.monotonic() at admission."""
    sequence: int = -1
    """Order of arrival at the scheduler."""
    status: ImageStatus = ImageStatus.WAITING
    slot: int | None = None
    plan_offset: int | None = None
    """First line of its plan in the model's table."""
    steps_done: int = 0
    started_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """Tells a runner to set up a slot."""

    slot: int
    params: ImageParams
    plan_offset: int
    write_plan: bool
    """Whether the plan's lines are not in the table yet."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One network call: which images of which model advance by a step, and which of them begin with it."""

    model: str
    images: tuple[Image, ...]
    starts: tuple[Start, ...]

    @property
    def rows(self) -> int:
        """Network rows, padding not counted."""
        return sum(image.params.rows for image in self.images)

    @property
    def slots(self) -> list[int]:
        """Slot of each image."""
        return [image.slot for image in self.images if image.slot is not None]


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What the engine says of an image that left it."""

    request_id: str
    position: int
    status: ImageStatus
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    """uint8 [H, W, C] where status is DONE."""
    queue_s: float = 0.0
    compute_s: float = 0.0
