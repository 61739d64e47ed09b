"""Response schemas of the native interface."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Upsampled(BaseModel):
    """The second stage of an image of a cascade."""

    model: str
    steps: int
    seed: int


class GeneratedImage(BaseModel):
    """One image and its parameters."""

    model_config = ConfigDict(populate_by_name=True)

    b64_json: str = Field(description="The image in the requested format, base64.")
    class_: str | None = Field(alias="class", description="Name of its class; null if the model has none.")
    class_index: int | None
    seed: int
    image_index: int
    steps: int
    start_timestep: int | None = Field(
        default=None, description="t of the training chain of its first step, if it began with a given image or latent."
    )
    upsampled: Upsampled | None = Field(default=None, description="Of a cascade: how the base's image was upsampled.")
    queue_ms: float = Field(description="From admission to its first network call.")
    compute_ms: float = Field(
        description="From its first network call to its last; of a cascade, with the wait between its stages."
    )


class Timing(BaseModel):
    """Predicted (at admission) and actual times. Predictions are 0 before any step was timed."""

    images_ahead: int = Field(
        description="Number of images before this request's first one in the queue, at admission."
    )
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


class CondInfo(BaseModel):
    """The conditioning image that a model takes, in the field `cond` of requests."""

    height: int
    width: int
    channels: int
    low_resolution: bool = Field(description="Whether it is the small picture of an upsampler, which is enlarged.")
    value_range: tuple[float, float] | list[tuple[float, float]] = Field(
        description="[low, high], the units of float32 arrays; one pair per channel if they differ. Eight-bit pixels "
        "map 0 to low and 255 to high."
    )


class CascadeInfo(BaseModel):
    """The models of a cascade."""

    base: str
    upsampler: str
    given_size: int | tuple[int, int] = Field(description="Size of given images, which the base's images have.")
    upsampler_num_timesteps: int = Field(description="The maximum of `upsample.steps`.")


class ModelInfo(BaseModel):
    """A served model."""

    name: str
    image_size: int | tuple[int, int] = Field(description="Of square images; [height, width] of others.")
    image_channels: int
    value_range: tuple[float, float] | list[tuple[float, float]] = Field(
        description="[low, high] of the data, the units of float32 arrays; one pair per channel if they differ. "
        "Eight-bit pixels map 0 to low and 255 to high."
    )
    cond: CondInfo | None = Field(description="Conditioning image that every request must have; null: none.")
    cascade: CascadeInfo | None = Field(
        default=None,
        description="The two models of a cascade; null: one model. Size, channels and value range are those of its "
        "results, all else is that of its base.",
    )
    classes: list[str] | None = Field(
        description="Class names in index order; null if unconditional. Those of the classifier if only it has classes."
    )
    num_timesteps: int = Field(description="T, the maximum of `steps`.")
    guidance: bool = Field(description="Whether cfg_scale other than 1 is possible.")
    default_cfg_scale: float
    classifier_guidance: bool = Field(description="Whether classifier_scale other than 0 is possible.")
    numerics_id: str
    backend: str


class SamplerInfo(BaseModel):
    """A sampler that every model can be sampled with."""

    name: str
    options: list[str] = Field(description="Names of the fields that only some samplers have.")
    recommended_steps: tuple[int, int] = Field(description="The least and the most steps that make sense.")


class ModelCard(BaseModel):
    """A served model as OpenAI's SDK lists it."""

    id: str = Field(description="Name of the model.")
    object: Literal["model"] = "model"
    created: int = Field(description="Time when the model was loaded, in seconds since 1970.")
    owned_by: Literal["iddpm"] = "iddpm"


class ModelList(BaseModel):
    """The served models, the default one first: all details, and the list that OpenAI's SDK reads."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    models: list[ModelInfo]
    samplers: list[SamplerInfo] = []


class Problem(BaseModel):
    """An error as application/problem+json (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[dict[str, str]] | None = Field(default=None, description="`field` and `message` of each broken rule.")
    predicted_finish_s: float | None = Field(
        default=None, description="When the images would be done, if that is after the deadline or the service's limit."
    )


class Status(BaseModel):
    """Answer of the health routes."""

    status: str
