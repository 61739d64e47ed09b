"""The body of a request for images: fields, types and limits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
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

from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED
from diffusion.plans import SAMPLERS, samplers_with_eta
from diffusion.quoting import in_words
from formats.given_shapes import Fit
from formats.images import JPEG_QUALITY
from service.models.class_names import MAX_CLASS_NAME
from service.requests.registered_name import NameIn
from service.requests.request_body import RequestBody
from service.requests.source import File

MAX_IMAGES = 64
DEFAULT_STEPS = 100
UPSAMPLE_STEPS = 25
"""Of the second stage of a cascade; arXiv:2105.05233, section 5."""
MAX_CFG_SCALE = 20.0
MAX_CLASSIFIER_SCALE = 100.0
MAX_DEADLINE_S = 86400.0
MAX_PREVIEW_EVERY = 10_000

MAX_RESAMPLE_TIMES = 20
MAX_RESAMPLE_JUMP = 4000

ImageFormat = Literal["png", "webp", "jpeg", "npz", "npy"]
ValueType = Literal["uint8", "float32"]
PriorityName = Literal["interactive", "batch"]
SamplerName = Annotated[str, NameIn(SAMPLERS)]
ClassSpec = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictStr, Field(min_length=1, max_length=MAX_CLASS_NAME)]


def _in_code(names: Iterable[str]) -> str:
    return in_words(f"`{name}`" for name in names)


def one_error(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Replace the errors of the union's members by one message that lists the valid forms of a class."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError(
            "class_spec",
            "must be the name of a class (1 to {name} characters), its index (an integer, 0 or more), or a list of 1 "
            "to {most} of these",
            {"name": MAX_CLASS_NAME, "most": MAX_IMAGES},
        ) from None


class UpsampleOptions(RequestBody):
    """How the upsampler of a cascade samples; the options of the request itself are those of the base."""

    steps: Annotated[StrictInt, Field(ge=2)] | None = Field(
        default=None, description=f"Respaced sampling steps, 2..T of the upsampler; default {UPSAMPLE_STEPS}."
    )
    sampler: SamplerName = Field(default="ancestral", description=f"{_in_code(SAMPLERS)}.")
    cfg_scale: Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CFG_SCALE, allow_inf_nan=False)] | None = Field(
        default=None, description="Classifier-free guidance scale; default: the value that the upsampler recommends."
    )
    classifier_scale: (
        Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CLASSIFIER_SCALE, allow_inf_nan=False)] | None
    ) = Field(default=None, description="Classifier guidance scale, if the upsampler has a classifier; default 0.")


class SamplingOptions(RequestBody):
    """Options with the same names in all interfaces."""

    model: StrictStr | None = Field(default=None, description="Name of a served model; default: the first.")
    steps: Annotated[StrictInt, Field(ge=2)] | None = Field(
        default=None,
        description="Respaced sampling steps, 2..T of the model; `GET /v1/models` lists those recommended with each "
        f"sampler; default {DEFAULT_STEPS}.",
    )
    respacing: Annotated[StrictStr, Field(max_length=200)] | None = Field(
        default=None,
        description="Instead of `steps`: '100', sections such as '10,10,20,40', or 'ddim25'.",
    )
    sampler: SamplerName = Field(default="ancestral", description=f"{_in_code(SAMPLERS)}.")
    eta: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description=f"Noise of {_in_code(samplers_with_eta())}, 0..1; default 0."
    )
    cfg_scale: Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CFG_SCALE, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Classifier-free guidance scale: 1 = off; default: the value that the model recommends.",
    )
    classifier_scale: (
        Annotated[StrictFloat | StrictInt, Field(ge=0, le=MAX_CLASSIFIER_SCALE, allow_inf_nan=False)] | None
    ) = Field(
        default=None,
        description="Classifier guidance scale, if the model has a noisy classifier: 0 = off, the default.",
    )
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="0..2^53-1; absent: random. The same seed gives the same pixels."
    )
    image_index: Annotated[StrictInt, Field(ge=0, le=MAX_IMAGE_INDEX)] = Field(
        default=0,
        description="Index of the first image; all are 0..2^32-1. Image k of a seed is the same in every request.",
    )
    priority: PriorityName = Field(
        default="interactive", description="`batch` work gets what interactive work leaves, and a guaranteed share."
    )
    deadline_s: Annotated[StrictFloat | StrictInt, Field(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Deadline for all images, in seconds; rejected at once (422) if predicted to be missed.",
    )
    upsample: UpsampleOptions | None = Field(
        default=None, description="Of a cascade: how its upsampler samples, with `seed` + 1."
    )


class ResampleOptions(RequestBody):
    """RePaint's jumps back to noisier steps (arXiv:2201.09865), which adapt the made pixels to the kept ones."""

    times: Annotated[StrictInt, Field(ge=1, le=MAX_RESAMPLE_TIMES)] = Field(
        description="How often each part of the chain is sampled."
    )
    jump: Annotated[StrictInt, Field(ge=1, le=MAX_RESAMPLE_JUMP)] = Field(description="Steps of such a part.")


class UseOfGiven(RequestBody):
    """What is done with given images; the fields have the same names in all interfaces."""

    strength: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="With `image`: part of the steps that is taken; 1: from noise alone."
    )
    start_timestep: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None,
        description="With `image` or `latent`: t of the training chain to begin at; the nearest step that is taken.",
    )
    resample: ResampleOptions | None = Field(default=None, description="With `mask`: RePaint's resampling.")
    fit: Fit | None = Field(
        default=None,
        description="Changes an `image`, `mask` and `cond` of another shape: `crop`, `pad` or `resize`; default: "
        "refused.",
    )


class GivenOptions(UseOfGiven):
    """Images, masks and latents that a request brings along, and what is done with them."""

    image: File | None = Field(
        default=None,
        description="Image to begin with, or of which a part is kept: PNG, WebP, JPEG, npy or npz, in base64. An array "
        "of shape [n, height, width, channels] has one per image.",
    )
    mask: File | None = Field(
        default=None,
        description="With `image`: white (or 1) where it is made anew, black (or 0) where it is kept; a file as there.",
    )
    latent: File | None = Field(
        default=None, description="Instead of `image`: x_t to begin with, float32, npy or npz in base64."
    )
    cond: File | None = Field(
        default=None,
        description="Conditioning image of a model that takes one (`cond` in GET /v1/models), of that shape: a file as "
        "`image`, or an array with one per image. For an upsampler: the small picture.",
    )


class GenerateRequest(GivenOptions, SamplingOptions):
    """A request for images. Requests of the other interfaces are converted to this one."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"class": "Sneaker", "n": 2, "steps": 50, "seed": 7}]},
    )

    class_: Annotated[
        ClassSpec | Annotated[list[ClassSpec], Field(min_length=1, max_length=MAX_IMAGES)] | None,
        WrapValidator(one_error),
    ] = Field(
        default=None,
        alias="class",
        description="Class by name or index, or a list with one per image; absent: drawn from the seed.",
    )
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        default=None, description=f"Images, 1..{MAX_IMAGES}; default 1, or the length of `class` if that is a list."
    )
    format: ImageFormat = Field(default="png", description="`png`, `webp` (lossless), `jpeg` (lossy), `npz` or `npy`.")
    dtype: ValueType = Field(
        default="uint8", description="Of `npz` and `npy`: `uint8`, or `float32` in the units of the data."
    )
    clip: StrictBool = Field(default=True, description="Whether the predicted image is clamped in each step.")
    quality: Annotated[StrictInt, Field(ge=1, le=100)] | None = Field(
        default=None, description=f"Quality of format `jpeg`, 1..100; default {JPEG_QUALITY}."
    )
    compression: Annotated[StrictInt, Field(ge=0, le=9)] | None = Field(
        default=None,
        description="Of the other formats, 0 (fast) to 9 (small); the pixels do not change; default: the encoder's.",
    )
    stream: StrictBool = Field(
        default=False, description="Answer with Server-Sent Events: queued, progress, preview, completed, failed."
    )
    preview_every: Annotated[StrictInt, Field(ge=1, le=MAX_PREVIEW_EVERY)] | None = Field(
        default=None,
        description="With `stream`: number of steps of an image between two of its previews; default: no previews. "
        "Slow readers get fewer.",
    )
