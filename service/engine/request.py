"""Requests, images, steps and results: the plain dataclasses that API and engine exchange. No torch, no HTTP."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from diffusion.chains import Chain
from service.engine.model_ids import name_of

FailureReason = Literal["not_finite", "error", "out_of_memory"]
"""Reason of a failed image: its numbers overflowed, the network raised, or it did not fit in memory even alone."""
FAILURE_REASONS: tuple[FailureReason, ...] = get_args(FailureReason)


PlanKey = Chain
"""Key of a sampling plan for a given model; images with equal keys share the plan's lines."""

Output = Literal["pixels", "values"]
"""What an image becomes: uint8 pixels, or the float32 values of the chain's end (of a raw call: its outputs)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GivenArrays:
    """Arrays of an image from outside, in host memory; images of a request share those that are for all."""

    image: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    """Image or latent [C, H, W] that the chain begins with, in the units where data spans [-1, 1]; finite. None: there
    is only `cond`."""
    mask: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    """1 where pixels are made, 0 where those of `image` are kept, [1, H, W]; None: all are made."""
    original: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    """`image` in the units of the data, [H, W, C]: kept values are returned from here. The engine does not read it."""
    cond: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    """Conditioning image [C', H, W] (`ModelConfig.cond_shape`), for a model that takes one."""

    @property
    def nbytes(self) -> int:
        """Return the memory that the arrays take, with `keep`."""
        arrays = (self.image, self.mask, self.mask, self.original, self.cond)
        return sum(array.nbytes for array in arrays if array is not None)

    @cached_property
    def keep(self) -> npt.NDArray[np.float32] | None:
        """How much of each given pixel is kept, [1, H, W]; None without a mask."""
        return None if self.mask is None else 1 - self.mask


@dataclass(frozen=True, kw_only=True)
class ImageParams:
    """Parameters that determine the pixels of one image for a given model."""

    plan: PlanKey
    num_steps: int
    """Number of network calls of the plan."""
    seed: int
    image_index: int
    class_index: int | None
    """None for an unconditional model, unless a classifier guides it."""
    cfg_scale: float = 1.0
    classifier_scale: float = 0.0
    given: GivenArrays | None = None
    output: Output = "pixels"

    @cached_property
    def has_mask(self) -> bool:
        """Return whether some pixels may be kept."""
        return self.given is not None and self.given.mask is not None

    @cached_property
    def has_finish(self) -> bool:
        """Return whether lines of its plan are followed by more than the next one: kept pixels, jumps."""
        return self.has_mask or self.plan.resample is not None

    @cached_property
    def rows(self) -> int:
        """Return the network rows per step: two with classifier-free guidance, else one."""
        return 1 if self.cfg_scale == 1.0 else 2

    @property
    def classified_rows(self) -> int:
        """Return the classifier rows per step: one with classifier guidance, else zero."""
        return 0 if self.classifier_scale == 0.0 else 1


NetworkOf = Callable[[ImageParams, int], int]
"""(an image, its sampling steps already taken) -> index of the network of its next step; for a model of several."""


class Priority(enum.Enum):
    """Scheduling priority: batch work gets the rows that interactive work leaves, but at least its share."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Progress reporting of a request's images."""

    preview_every: int | None = None
    """Steps between two previews of an image's predicted result, at least 1; None for no previews."""


@dataclass(frozen=True, kw_only=True)
class NextStage:
    """The second stage of a cascade: another model, conditioned on the finished images of the first."""

    model: str
    images: tuple[ImageParams, ...]
    """One per image of the request, still without `given`."""
    cond_of: Callable[[ImageParams, ImageResult], npt.NDArray[np.float32]]
    """(an image of the first stage, its result) -> conditioning image [C', H, W]. Called in the engine's thread."""
    cond_bytes: int
    """Memory of one conditioning image."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One validated request of a client: n images of one model, or of a cascade of two."""

    request_id: str
    model: str
    images: tuple[ImageParams, ...]
    then: NextStage | None = None
    """What each image of a cascade runs next."""
    served_as: str | None = None
    """Name of the cascade in metrics; None: that of the model."""
    client: str = ""
    """Client id for fair scheduling: an address or the name of a key, opaque here. Unnamed requests share ""."""
    max_client_images: int | None = None
    """Maximum images of this client in flight, including this request's; None for no client-specific limit."""
    priority: Priority = Priority.INTERACTIVE
    deadline_s: float | None = None
    """Seconds from admission within which every image must complete; None for no deadline."""
    longest_s: float | None = None
    """Seconds after which the service gives the request up; None: never."""
    watch: Watch | None = None
    """None to report nothing before an image is done."""

    @property
    def stages(self) -> tuple[tuple[ImageParams, ...], ...]:
        """Return the images of each stage."""
        return (self.images,) if self.then is None else (self.images, self.then.images)

    @property
    def models(self) -> tuple[str, ...]:
        """Return the id of the model of each stage."""
        return (self.model,) if self.then is None else (self.model, self.then.model)

    def num_steps(self, position: int) -> int:
        """Return the sampling steps of an image in all stages."""
        return sum([images[position].num_steps for images in self.stages])

    @property
    def results(self) -> tuple[ImageParams, ...]:
        """Return the parameters of the stage that makes the results."""
        return self.stages[-1]

    @property
    def name(self) -> str:
        """Return the name of its model or cascade, for metrics."""
        return name_of(self.model) if self.served_as is None else self.served_as

    @property
    def rows(self) -> int:
        """Return the network rows per step of all its images, in the stage that has more."""
        if self.then is None:
            return sum([image.rows for image in self.images])
        return sum([max(first.rows, second.rows) for first, second in zip(*self.stages, strict=True)])

    @property
    def given_bytes(self) -> int:
        """Return the memory of the given arrays of its images, and of the conditioning images of its second stage."""
        arrays = {id(image.given): image.given for image in self.images if image.given is not None}
        later = 0 if self.then is None else self.then.cond_bytes * len(self.images)
        return sum(given.nbytes for given in arrays.values()) + later

    @property
    def row_steps(self) -> int:
        """Return the work of all its images: rows times steps."""
        return sum([image.rows * image.num_steps for images in self.stages for image in images])


class ImageStatus(enum.Enum):
    """Lifecycle state of an image."""

    WAITING = "waiting"
    """Not started; holds no slot."""
    RUNNING = "running"
    """Holds a slot, whether or not it takes part in the current step."""
    EVICTED = "evicted"
    """Started, but without a slot; its state is in host memory."""
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


Order = tuple[float, int]
"""Sort key of images within a priority, least first; see `service.engine.order`."""


@dataclass(eq=False, kw_only=True)
class Image:
    """An accepted image, or a stage of it: the same object from admission to result.

    `ServiceOrder` sets `sequence`, `arrival_step` and `order` at admission. Afterwards only the scheduler writes, and
    only `order` and the fields below it; the engine completes `params` of a second stage before it begins. Any thread
    may read the other fields.
    """

    request: GenerationRequest
    position: int
    """Index of the image in its request."""
    submitted_at: float
    """time.monotonic() at admission."""
    stage: int = 0
    """Index of the stage, 0 or 1."""
    then: Image | None = field(default=None, init=False, repr=False)
    """The second stage, which begins when this one is done; None: this one's result is the image's. It does not refer
    to this one: a cycle would keep the arrays of both in memory after their end."""
    model: str = field(init=False)
    """Id of the model that runs it."""
    params: ImageParams = field(init=False)
    rows: int = field(init=False)
    """Network rows per step."""
    classified_rows: int = field(init=False)
    """Classifier rows per step."""
    row_steps: int = field(init=False)
    """Total work: rows times steps."""
    deadline: float | None = field(init=False)
    """Deadline on the clock of `submitted_at`."""
    sequence: int = -1
    """Arrival number."""
    arrival_step: int = 0
    """Steps of its model at arrival. Age is counted in steps, so that the order does not depend on a clock."""
    order: Order = (0.0, -1)
    """Changes only when the image takes a step."""
    status: ImageStatus = ImageStatus.WAITING
    slot: int | None = None
    steps_done: int = 0
    started_at: float | None = None
    begun_before: float | None = None
    """Time of the first step of an earlier stage."""

    def __post_init__(self) -> None:
        request, deadline_s = self.request, self.request.deadline_s
        if self.stage == 0 and request.then is not None:
            self.then = Image(request=request, position=self.position, submitted_at=self.submitted_at, stage=1)
        self.model = request.models[self.stage]
        self.params = params = request.stages[self.stage][self.position]
        self.rows = params.rows
        self.classified_rows = params.classified_rows
        self.row_steps = params.rows * params.num_steps
        self.deadline = None if deadline_s is None else self.submitted_at + deadline_s

    @property
    def request_id(self) -> str:
        """Return the id of its request."""
        return self.request.request_id

    @property
    def held_rows(self) -> int:
        """Return the rows of the stage that has most, for limits that hold until the image ends."""
        if self.request.then is None:
            return self.rows
        return max([images[self.position].rows for images in self.request.stages])

    @property
    def _before(self) -> list[ImageParams]:
        return [images[self.position] for images in self.request.stages[: self.stage]]

    @property
    def steps_before(self) -> int:
        """Return the sampling steps of earlier stages."""
        return sum([stage.num_steps for stage in self._before])

    @property
    def row_steps_before(self) -> int:
        """Return the work of earlier stages."""
        return sum([stage.rows * stage.num_steps for stage in self._before])

    @property
    def begun_at(self) -> float | None:
        """Return the time of its first step, in any stage."""
        return self.started_at if self.begun_before is None else self.begun_before

    @property
    def client(self) -> str:
        """Return the client of its request."""
        return self.request.client

    @property
    def priority(self) -> Priority:
        """Return the priority of its request."""
        return self.request.priority

    @property
    def watch(self) -> Watch | None:
        """Return the progress reporting of its request."""
        return self.request.watch

    @property
    def remaining_row_steps(self) -> int:
        """Return the remaining work of this stage: rows times steps."""
        return self.row_steps - self.rows * self.steps_done

    @property
    def later_row_steps(self) -> int:
        """Return the work of the next stage."""
        return 0 if self.then is None else self.then.row_steps


class ImageStep(NamedTuple):
    """One step of one image, as input to a runner. All values are on the host."""

    slot: int
    """Slot that holds the image's arrays."""
    params: ImageParams
    step: int
    """Sampling steps already taken; 0 for the image's first step."""


def rows_of(steps: Iterable[ImageStep]) -> int:
    """Return the network rows of a batch of steps, without padding."""
    return sum([step.params.rows for step in steps])


@dataclass(frozen=True, kw_only=True)
class Move:
    """Instruction to copy a slot to host memory, or to restore an image into a slot, possibly another one."""

    image: Image
    slot: int


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One network call: images of one model that advance by a step of one network, and the slot moves before it.

    Apply them in this order: evictions, restores, the step.
    """

    model: str
    images: tuple[Image, ...]
    steps: tuple[ImageStep, ...]
    """The step of each image, in the order of `images`."""
    evictions: tuple[Move, ...] = ()
    restores: tuple[Move, ...] = ()
    preempted: int = 0
    """Number of unfinished images of the model's last step that were not picked for this one."""

    @cached_property
    def rows(self) -> int:
        """Return the network rows, without padding."""
        return rows_of(self.steps)

    @cached_property
    def classified_rows(self) -> int:
        """Return the classifier rows, without padding."""
        return sum([image.classified_rows for image in self.images])

    @cached_property
    def cascades(self) -> frozenset[str]:
        """Return the names of the cascades that images belong to."""
        return frozenset([name for image in self.images if (name := image.request.served_as) is not None])

    def part(self, images: Sequence[Image]) -> StepBatch:
        """Return the batch of some of its images, given in its order.

        The part has no moves: they are applied once, before any part.
        """
        if len(images) == len(self.images):
            return self
        taking = set(images)
        steps = [step for image, step in zip(self.images, self.steps, strict=True) if image in taking]
        return StepBatch(model=self.model, images=tuple(images), steps=tuple(steps))


@dataclass(frozen=True, kw_only=True)
class ImageProgress:
    """Progress of a watched image after a step that is not its last."""

    request_id: str
    position: int
    """Index of the image in its request."""
    step: int
    """Sampling steps taken, in all stages."""
    steps: int
    eta_s: float = 0.0
    """Predicted seconds until the request's last image completes; set by `EventStream` when the event is read."""


@dataclass(frozen=True, kw_only=True)
class ImagePreview:
    """Predicted result of a watched image, after some of its steps."""

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
    """Result of an image that left the engine."""

    request_id: str
    position: int
    status: ImageStatus
    pixels: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    """uint8 [H, W, C] if status is DONE and the output is pixels, else None."""
    values: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    """float32 [C, H, W] if status is DONE and the output is values, else None. Of a raw call: prediction and log
    variance, [2 * C, H, W]."""
    failure: FailureReason | None = None
    """Set if status is FAILED."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    late_s: float = 0.0
    """Seconds by which it missed its deadline; 0 if it did not."""
