"""What goes over the wire: the request's fields and their limits, and the answer's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from diffusion.images import JPEG_QUALITY
from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED
from diffusion.plans import Sampler
from service.api.request_body import RequestBody

MAX_IMAGES = 64
DEFAULT_STEPS = 100
MAX_CFG_SCALE = 20.0
MAX_CLASSIFIER_SCALE = 100.0
MAX_DEADLINE_S = 86400.0
MAX_PREVIEW_EVERY = 10_000
MAX_CLASS_NAME = 200
"""Characters."""

ImageFormat = Literal["png", "webp", "jpeg", "npz"]
PriorityName = Literal["interactive", "batch"]
ClassSpec = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictStr, Field(min_length=1, max_length=MAX_CLASS_NAME)]


def _say_once(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Say of a class that is none what it may be, instead of what each kind of it may be."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError(
            "class_spec",
            "must be the name of a class (1 to {name} characters), its index (an integer, 0 or more), or a list of 1 "
            "to {most} of these",
            {"name": MAX_CLASS_NAME, "most": MAX_IMAGES},
        ) from None


class SamplingOptions(RequestBody):
    """What every interface lets a client choose, under these names."""

    model: StrictStr | None = Field(default=None, description="Name of a served model; default: the first.")
    steps: Annotated[StrictInt, Field(ge=2)] | None = Field(
        default=None,
        description=f"Respaced sampling steps, 2..T of the model, 50 to 250 recommended; default {DEFAULT_STEPS}.",
    )
    respacing: Annotated[StrictStr, Field(max_length=200)] | None = Field(
        default=None,
        description="Instead of `steps`: '100', sections such as '10,10,20,40', or 'ddim25'.",
    )
    sampler: Sampler = Field(default="ancestral", description="`ancestral` or `ddim`.")
    eta: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Noise of `ddim`, 0..1; default 0."
    )
    cfg_scale: Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CFG_SCALE, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Classifier-free guidance: 1 = off; default: what the model recommends.",
    )
    classifier_scale: (
        Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CLASSIFIER_SCALE, allow_inf_nan=False)] | None
    ) = Field(
        default=None,
        description="Classifier guidance, where the model has a noisy classifier: 0 = off, the default.",
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="0..2^53-1; absent: random. The same seed gives the same pixels."
    )
    image_index: Annotated[StrictInt, Field(ge=0, le=MAX_IMAGE_INDEX)] = Field(
        default=0,
        description="Index of the first image: image k of a seed is the same in any request. All are 0..2^32-1.",
    )
    priority: PriorityName = Field(
        default="interactive", description="`batch` work takes what interactive work leaves, and a share."
    )
    deadline_s: Annotated[StrictFloat | StrictInt, Field(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Seconds within which all images are wanted; refused at once (422) if that is predicted to fail.",
    )


class GenerateRequest(SamplingOptions):
    """A request for images. Those of other interfaces become one."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"class": "Sneaker", "n": 2, "steps": 50, "seed": 7}]},
    )

    class_: Annotated[
        ClassSpec | Annotated[list[ClassSpec], Field(min_length=1, max_length=MAX_IMAGES)] | None,
        WrapValidator(_say_once),
    ] = Field(
        default=None,
        alias="class",
        description="Class by name or index, or a list with one per image; absent: drawn from the seed.",
    )
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        default=None, description=f"Images, 1..{MAX_IMAGES}; default 1, or the length of `class` if that is a list."
    )
    format: ImageFormat = Field(default="png", description="`png`, `webp` (lossless), `jpeg` (lossy) or `npz`.")
    quality: Annotated[StrictInt, Field(ge=1, le=100)] | None = Field(
        default=None, description=f"Of format `jpeg`, 1..100; default {JPEG_QUALITY}."
    )
    compression: Annotated[StrictInt, Field(ge=0, le=9)] | None = Field(
        default=None,
        description="Of the other formats, 0 (fast) to 9 (small): the pixels are the same; default: the encoder's.",
    )
    stream: StrictBool = Field(
        default=False, description="Answer with Server-Sent Events: queued, progress, preview, completed, failed."
    )
    preview_every: Annotated[StrictInt, Field(ge=1, le=MAX_PREVIEW_EVERY)] | None = Field(
        default=None,
        description="With `stream`: show what an image is going to be every so many of its steps; default: never. "
        "Slow readers get fewer.",
    )


class GeneratedImage(BaseModel):
    """One image and what it was made from."""

    model_config = ConfigDict(populate_by_name=True)

    b64_json: str = Field(description="The image in the requested format, base64.")
    class_: str | None = Field(alias="class", description="Name of its class; null if the model has none.")
    class_index: int | None
    seed: int
    image_index: int
    steps: int
    queue_ms: float = Field(description="From admission to its first network call.")
    compute_ms: float = Field(description="From its first network call to its last.")


class Timing(BaseModel):
    """What was predicted on admission, and what it came to. Predictions are 0 before any step was timed."""

    images_ahead: int = Field(description="Images that came before this request's first one, on admission.")
    predicted_wait_s: float = Field(description="From admission to the first network call.")
    wait_s: float
    predicted_finish_s: float = Field(description="From admission to the last image.")
    finish_s: float


class GenerateResponse(BaseModel):
    """The images of a request, in order."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    images: list[GeneratedImage]
    numerics_id: str = Field(description="Equal ids give equal pixels for equal requests.")
    timing: Timing


class ModelInfo(BaseModel):
    """A served model."""

    name: str
    image_size: int
    image_channels: int
    classes: list[str] | None = Field(
        description="Class names in index order; null if unconditional. Of a classifier, where only that has classes."
    )
    num_timesteps: int = Field(description="T: `steps` may be at most this.")
    guidance: bool = Field(description="Whether cfg_scale other than 1 is possible.")
    default_cfg_scale: float
    classifier_guidance: bool = Field(description="Whether classifier_scale other than 0 is possible.")
    numerics_id: str
    backend: str


class ModelCard(BaseModel):
    """A served model as OpenAI's SDK lists it."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = "model"
    created: int = Field(description="When it was loaded, in seconds since 1970.")
    owned_by: Literal["iddpm"] = "iddpm"


class ModelList(BaseModel):
    """The served models, the default one first: all we know of them, and what OpenAI's SDK reads."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    models: list[ModelInfo]


class Problem(BaseModel):
    """An error as application/problem+json (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[dict[str, str]] | None = Field(default=None, description="`field` and `message` of each broken rule.")
    predicted_finish_s: float | None = Field(
        default=None, description="When the images would be done, where a deadline cannot be met."
    )


class Status(BaseModel):
    """Answer of the health routes."""

    status: str
