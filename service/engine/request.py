"""What crosses between API and engine: plain dataclasses. No torch, no HTTP."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

FailureReason = Literal["not_finite", "error", "out_of_memory"]
"""Why an image failed: its numbers overflowed; the network raised on it; not even it alone fitted memory."""
FAILURE_REASONS: tuple[FailureReason, ...] = get_args(FailureReason)


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """What determines a sampling plan, for a given model; images that share it share the plan's lines."""

    sampler: str
    """A name in `diffusion.plans.SAMPLERS`."""
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
    """None for an unconditional model, unless a classifier guides it."""
    cfg_scale: float = 1.0
    classifier_scale: float = 0.0

    @cached_property
    def rows(self) -> int:
        """Network rows per step: two with classifier-free guidance."""
        return 1 if self.cfg_scale == 1.0 else 2

    @property
    def classified_rows(self) -> int:
        """Rows per step that the classifier is called on: one with classifier guidance."""
        return 0 if self.classifier_scale == 0.0 else 1


class Priority(enum.Enum):
    """Who goes first: batch work takes what interactive work leaves, and never less than its share."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is to be told of a request's images while they are made."""

    preview_every: int | None = None
    """Show what an image is predicted to become every so many of its steps; None: never. At least 1."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call of a client, checked and complete: n images of one model."""

    request_id: str
    model: str
    images: tuple[ImageParams, ...]
    client: str = ""
    """Who asks, for fairness; requests without a name share one. Opaque: an address, the name of a key."""
    max_client_images: int | None = None
    """Most images that this client may have in flight, this request's among them; None: no limit of its own."""
    priority: Priority = Priority.INTERACTIVE
    deadline_s: float | None = None
    """Seconds from its admission within which every image is wanted; None: whenever."""
    watch: Watch | None = None
    """None: nobody is told before an image is done."""

    @property
    def rows(self) -> int:
        """Network rows per step of all its images."""
        return sum(image.rows for image in self.images)

    @property
    def row_steps(self) -> int:
        """Work: rows times steps."""
        return sum(image.rows * image.num_steps for image in self.images)


class ImageStatus(enum.Enum):
    """Where an image is in its life."""

    WAITING = "waiting"
    """Not started: holds nothing."""
    RUNNING = "running"
    """Holds a slot, whether or not it takes part in this step."""
    EVICTED = "evicted"
    """Started; its state is in host memory, its slot serves another."""
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


Order = tuple[float, int]
"""What images of a priority are sorted by, least first; see `service.engine.order`."""


@dataclass(eq=False, kw_only=True)
class Image:
    """An accepted image: one object from its admission to its result.

    `ServiceOrder` sets `sequence`, `arrival_step` and `order` at admission. From then on only the scheduler writes,
    and nothing but `order` and what comes after it: any thread may read the rest.
    """

    request: GenerationRequest
    position: int
    """Which image of its request."""
    submitted_at: float
    """time.monotonic() at admission."""
    params: ImageParams = field(init=False)
    rows: int = field(init=False)
    """Network rows per step."""
    classified_rows: int = field(init=False)
    """Rows per step that the classifier is called on."""
    row_steps: int = field(init=False)
    """Work of all its steps: rows times steps."""
    deadline: float | None = field(init=False)
    """On the clock of `submitted_at`."""
    sequence: int = -1
    """Order of arrival."""
    arrival_step: int = 0
    """Steps its model had taken when it arrived: age is counted in steps, so that no clock decides an order."""
    order: Order = (0.0, -1)
    """Changes only when the image takes a step."""
    status: ImageStatus = ImageStatus.WAITING
    slot: int | None = None
    steps_done: int = 0
    started_at: float | None = None

    def __post_init__(self) -> None:
        params, deadline_s = self.request.images[self.position], self.request.deadline_s
        self.params = params
        self.rows = params.rows
        self.classified_rows = params.classified_rows
        self.row_steps = params.rows * params.num_steps
        self.deadline = None if deadline_s is None else self.submitted_at + deadline_s

    @property
    def request_id(self) -> str:
        """Return its request's id."""
        return self.request.request_id

    @property
    def model(self) -> str:
        """Return the id of the model that makes it."""
        return self.request.model

    @property
    def client(self) -> str:
        """Return who asks for it."""
        return self.request.client

    @property
    def priority(self) -> Priority:
        """Return its request's priority."""
        return self.request.priority

    @property
    def watch(self) -> Watch | None:
        """Return what of it is to be shown while it is made."""
        return self.request.watch

    @property
    def remaining_row_steps(self) -> int:
        """Return the work left: rows times steps."""
        return self.row_steps - self.rows * self.steps_done


class ImageStep(NamedTuple):
    """Which step of which image a runner takes: every number of an image is on the host, with whom it is known."""

    slot: int
    """Where the image's arrays are."""
    params: ImageParams
    step: int
    """Sampling steps that the image has taken; 0: it starts with this one."""


def rows_of(steps: Iterable[ImageStep]) -> int:
    """Return the network rows of steps that are taken together, padding not counted."""
    return sum([step.params.rows for step in steps])


@dataclass(frozen=True, kw_only=True)
class Move:
    """Tells a runner to copy a slot to host memory, or back into a slot (perhaps another one)."""

    image: Image
    slot: int


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One network call: which images of which model advance by a step, and what becomes of slots before it.

    In this order: evictions, restores, the step.
    """

    model: str
    images: tuple[Image, ...]
    steps: tuple[ImageStep, ...]
    """Of each image, the step that it takes."""
    evictions: tuple[Move, ...] = ()
    restores: tuple[Move, ...] = ()
    preempted: int = 0
    """Images of the model's last step that could have gone on and were not picked."""

    @cached_property
    def rows(self) -> int:
        """Network rows, padding not counted."""
        return rows_of(self.steps)

    @cached_property
    def classified_rows(self) -> int:
        """Rows that the classifier is called on, padding not counted."""
        return sum([image.classified_rows for image in self.images])

    def part(self, images: Sequence[Image]) -> StepBatch:
        """Return the step of some of its images, given in its order: without the moves, which come before any part."""
        if len(images) == len(self.images):
            return self
        taking = set(images)
        steps = [step for image, step in zip(self.images, self.steps, strict=True) if image in taking]
        return StepBatch(model=self.model, images=tuple(images), steps=tuple(steps))


@dataclass(frozen=True, kw_only=True)
class ImageProgress:
    """How far a watched image has come after a step that is not its last."""

    request_id: str
    position: int
    """Which image of its request."""
    step: int
    """Sampling steps taken."""
    steps: int
    eta_s: float = 0.0
    """Predicted seconds until the request's last image is done; filled in when the event is read (`EventStream`)."""


@dataclass(frozen=True, kw_only=True)
class ImagePreview:
    """What a watched image is predicted to become, after some of its steps."""

    request_id: str
    position: int
    step: int
    steps: int
    eta_s: float = 0.0
    """As in `ImageProgress`."""
    pixels: npt.NDArray[np.uint8] = field(repr=False)
    """uint8 [H, W, C] of the predicted x0."""


Observation = ImageProgress | ImagePreview


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What the engine says of an image that left it."""

    request_id: str
    position: int
    status: ImageStatus
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    """uint8 [H, W, C] where status is DONE."""
    failure: FailureReason | None = None
    """Where status is FAILED."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    late_s: float = 0.0
    """How long after its deadline it finished."""
