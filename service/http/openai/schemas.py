"""What goes over the wire in OpenAI's Images interface, as their SDK has it; what it does not know, it hands on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from service.http.native.schemas import GeneratedImage, Timing
from service.requests.generate_request import MAX_IMAGES, SamplingOptions

MAX_PROMPT = MAX_IMAGES * 200
MAX_PARTIAL_IMAGES = 3

OutputFormat = Literal["png", "webp", "jpeg"]


class ImagesRequest(SamplingOptions):
    """A request for images; our own fields go into `extra_body` of the SDK."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "sneaker, ankle boot", "n": 4, "steps": 50, "seed": 7}],
        },
    )

    prompt: Annotated[StrictStr, Field(max_length=MAX_PROMPT)] = Field(
        default="",
        description="A class by name (whatever its case, spaces and underscores) or index, or several between commas. "
        "Empty or absent: drawn from the seed.",
    )
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        default=None, description="Images; where `prompt` lists several classes: that many, or a multiple of it."
    )
    size: StrictStr | None = Field(default=None, description="`auto`, or the model's own, such as `32x32`.")
    response_format: Literal["b64_json"] | None = Field(
        default=None, description="Pictures come in the answer: none are kept that a url could lead to."
    )
    output_format: OutputFormat | None = Field(
        default=None, description="`png`, `webp` (lossless) or `jpeg` (lossy); default `png`."
    )
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of `jpeg`; the others lose nothing, whatever this is."
    )
    stream: StrictBool | None = Field(default=None, description="Answer with server-sent events.")
    partial_images: Annotated[StrictInt, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = Field(
        default=None, description="Previews of each image at most, where `stream` is true."
    )
    quality: Literal["auto", "standard"] | None = Field(default=None, description="`steps` is what makes it better.")
    style: Literal["vivid", "natural"] | None = Field(default=None, description="Not used: pictures have one style.")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="There is no transparency.")
    moderation: Literal["auto", "low"] | None = Field(default=None, description="Not used: classes are a fixed list.")
    user: Annotated[StrictStr, Field(max_length=512)] | None = Field(default=None, description="Not used.")
    safety_identifier: Annotated[StrictStr, Field(max_length=512)] | None = Field(default=None, description="Not used.")


class ImagesResponse(BaseModel):
    """The images of a request, in order: OpenAI's members, and what ours were made from."""

    model_config = ConfigDict(protected_namespaces=())

    created: int = Field(description="Seconds since 1970.")
    data: list[GeneratedImage]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    model: str
    numerics_id: str = Field(description="Equal ids give equal pixels for equal requests.")
    timing: Timing


class TokenDetails(BaseModel):
    """Of tokens."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """The SDK's type demands it; there are no tokens here."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class _ImageEvent(BaseModel):
    """What both events say."""

    created_at: int = Field(description="Seconds since 1970.")
    position: int = Field(description="Which image of the request.")
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str


class PartialImageEvent(_ImageEvent):
    """What an image is predicted to become."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int = Field(description="Counts this image's previews, from 0.")
    step: int = Field(description="Steps taken.")
    steps: int
    eta_s: float = Field(description="Predicted, until the last image is done.")


class CompletedEvent(_ImageEvent, GeneratedImage):
    """An image that is done."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage = Usage()


class OpenAIErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error as OpenAI's SDK reads it."""

    error: OpenAIErrorBody
