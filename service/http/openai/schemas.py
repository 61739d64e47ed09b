"""Schemas of OpenAI's Images interface, as in its SDK, which passes unknown fields on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictBytes, StrictInt, StrictStr

from service.http.native.schemas import GeneratedImage, Timing
from service.requests.generate_request import MAX_IMAGES, SamplingOptions, UseOfGiven

MAX_PROMPT = MAX_IMAGES * 200
MAX_PARTIAL_IMAGES = 3

OutputFormat = Literal["png", "webp", "jpeg"]


class ImagesRequest(SamplingOptions):
    """A request for images; the SDK sends the fields of the native interface by `extra_body`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "sneaker, ankle boot", "n": 4, "steps": 50, "seed": 7}],
        },
    )

    prompt: Annotated[StrictStr, Field(max_length=MAX_PROMPT)] = Field(
        default="",
        description="Classes by name (ignoring case, spaces and underscores) or index, separated by commas. "
        "Empty or absent: drawn from the seed.",
    )
    n: Annotated[StrictInt, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        default=None,
        description="Number of images; if `prompt` lists several classes, their number or a multiple of it.",
    )
    size: StrictStr | None = Field(default=None, description="`auto`, or the model's image size, such as `32x32`.")
    response_format: Literal["b64_json"] | None = Field(
        default=None, description="Images are part of the answer; the service stores none, so there are no URLs."
    )
    output_format: OutputFormat | None = Field(
        default=None, description="`png`, `webp` (lossless) or `jpeg` (lossy); default `png`."
    )
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] | None = Field(
        default=None, description="Quality of `jpeg`; ignored for the other formats, which are lossless."
    )
    stream: StrictBool | None = Field(default=None, description="Answer with server-sent events.")
    partial_images: Annotated[StrictInt, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = Field(
        default=None, description="Maximum number of previews of each image, if `stream` is true."
    )
    quality: Literal["auto", "standard"] | None = Field(
        default=None, description="Not used: set `steps` for better images."
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description="Not used: there is only one style.")
    background: Literal["auto", "opaque"] | None = Field(
        default=None, description="Not used: there is no transparency."
    )
    moderation: Literal["auto", "low"] | None = Field(default=None, description="Not used: classes are a fixed list.")
    user: Annotated[StrictStr, Field(max_length=512)] | None = Field(default=None, description="Not used.")
    safety_identifier: Annotated[StrictStr, Field(max_length=512)] | None = Field(default=None, description="Not used.")


class EditRequest(UseOfGiven, ImagesRequest):
    """A form with an image; the SDK sends the fields of the native interface by `extra_body`."""

    image: StrictBytes = Field(
        description="Image to edit: PNG, WebP, JPEG, npy or npz. Without `mask`, its transparent pixels are made."
    )
    mask: StrictBytes | None = Field(
        default=None, description="Picture with an alpha channel: transparent pixels are made, opaque ones are kept."
    )
    cond: StrictBytes | None = Field(
        default=None, description="Conditioning image of a model that takes one, as for `/v1/generate`; a file."
    )
    input_fidelity: Literal["high", "low"] | None = Field(
        default=None, description="Not used: kept pixels are returned as they are."
    )


class ImagesResponse(BaseModel):
    """The images of a request, in order: OpenAI's members and the parameters of the images."""

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
    """Details of token counts."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Token counts, required by the SDK's type; there are no tokens here."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class _ImageEvent(BaseModel):
    """Common members of both events."""

    created_at: int = Field(description="Seconds since 1970.")
    position: int = Field(description="Position of the image in the request.")
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str


class PartialImageEvent(_ImageEvent):
    """Preview: the predicted final image."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    b64_json: str
    partial_image_index: int = Field(description="Counts this image's previews, from 0.")
    step: int = Field(description="Steps taken.")
    steps: int
    eta_s: float = Field(description="Predicted, until the last image is done.")


class CompletedEvent(_ImageEvent, GeneratedImage):
    """A finished image."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage = Usage()


class OpenAIErrorBody(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """An error as OpenAI's SDK reads it."""

    error: OpenAIErrorBody
