"""Choose the form of an answer, and encode the answer in that form."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Literal

import numpy as np
from starlette.responses import Response

from diffusion.chains import build_chain
from diffusion.config import ModelConfig
from diffusion.quoting import alternatives, quoted
from formats.images import LONGEST_SIDES, grid_size
from service.encoding import (
    ARRAY_FORMATS,
    CHANNELS,
    MEDIA_TYPES,
    PICTURE_FORMATS,
    ZIP_MEDIA_TYPE,
    encode_one,
    encode_picture,
    encode_zip,
    file_name,
)
from service.engine.request import ImageParams, ImageResult
from service.errors import InvalidRequest, NotAcceptable
from service.http.execution import Accepted, Finished
from service.http.native.accept import preferred
from service.http.native.schemas import GeneratedImage, GenerateResponse, Upsampled
from service.requests.generate_request import GenerateRequest, ImageFormat

JSON_MEDIA_TYPE = "application/json"

Body = Literal["json", "file", "zip"]


@dataclass(frozen=True)
class Form:
    """The form of an answer."""

    body: Body
    """One of: JSON with base64 images, the picture or npz file itself, a zip of pictures."""
    format: ImageFormat
    quality: int | None
    compression: int | None


def form_of(body: GenerateRequest, accept: str, channels: int) -> Form:
    """Choose the form of an answer.

    Args:
        body: names the format of the images; with `stream` the answer is always JSON.
        accept: the Accept header; JSON, unless it prefers a file (`service.http.native.accept`).
        channels: number of channels of the model's images.

    Raises:
        NotAcceptable: the header allows no available form.
        InvalidRequest: options contradict each other, or the format cannot hold the model's images.
    """
    kind, image_format = _preferred("" if body.stream else accept, body.format)
    if body.preview_every is not None and not body.stream:
        raise InvalidRequest("preview_every", "is valid only with `stream`, which is false")
    if body.quality is not None and image_format != "jpeg":
        raise InvalidRequest("quality", f'is valid only with format "jpeg"; format is {quoted(image_format)}')
    if body.compression is not None and image_format == "jpeg":
        raise InvalidRequest("compression", 'is not valid with format "jpeg", which has `quality`')
    if body.dtype == "float32" and image_format not in ARRAY_FORMATS:
        wanted = alternatives(ARRAY_FORMATS)
        raise InvalidRequest("dtype", f"float32 is valid only with format {wanted}; format is {quoted(image_format)}")
    if body.compression is not None and image_format == "npy":
        raise InvalidRequest("compression", 'is not valid with format "npy", which is not compressed')
    if kind == "zip" and image_format in ARRAY_FORMATS:
        raise InvalidRequest(
            "format", f"must be {alternatives(PICTURE_FORMATS)} in a zip; an npz or npy holds all images by itself"
        )
    if channels not in CHANNELS.get(image_format, (channels,)):
        fit = [name for name in MEDIA_TYPES if channels in CHANNELS.get(name, (channels,))]
        raise InvalidRequest(
            "format", f"must be {alternatives(fit)} for images of {channels} channels; got {quoted(image_format)}"
        )
    return Form(kind, image_format, body.quality, body.compression)


def refuse_large_grid(form: Form, count: int, model: ModelConfig) -> None:
    """Check that one picture of several images is not larger than its format holds.

    Raises:
        InvalidRequest: it is.
    """
    most = LONGEST_SIDES.get(form.format)
    longest = max(grid_size(count, model.image_height, model.image_width))
    if form.body == "file" and most is not None and longest > most:
        raise InvalidRequest(
            "format",
            f"{form.format} files hold at most {most} pixels per side, and a grid of these {count} images has "
            f"{longest}; accept {ZIP_MEDIA_TYPE}",
        )


def answer(form: Form, finished: Finished) -> Response:
    """Encode the images of a request in the chosen form."""
    if form.body == "json":
        return Response(answer_json(form, finished), media_type=JSON_MEDIA_TYPE)
    accepted, results = finished.accepted, finished.results
    params = accepted.images
    headers = {"X-Seed": str(params[0].seed), "X-Numerics-Id": accepted.model.numerics_id}
    if form.body == "zip":
        files = [
            (
                file_name(k, _class_name(accepted, p), p.seed, p.image_index, form.format),
                _encode(form, accepted, p, result),
            )
            for k, (p, result) in enumerate(zip(params, results, strict=True))
        ]
        headers["Content-Disposition"] = f'attachment; filename="iddpm-{params[0].seed}.zip"'
        return Response(encode_zip(files), media_type=ZIP_MEDIA_TYPE, headers=headers)
    pixels = np.stack([accepted.pixels(result) for result in results])
    content = encode_picture(
        pixels, [p.class_index for p in params], form.format, quality=form.quality, compression=form.compression
    )
    return Response(content, media_type=MEDIA_TYPES[form.format], headers=headers)


def answer_json(form: Form, finished: Finished) -> str:
    """Encode the images of a request as JSON with base64 images."""
    images = [generated_image(form, finished.accepted, result) for result in finished.results]
    model = finished.accepted.model
    response = GenerateResponse(model=model.name, images=images, numerics_id=model.numerics_id, timing=finished.timing)
    return response.model_dump_json(by_alias=True)


def generated_image(form: Form, accepted: Accepted, result: ImageResult) -> GeneratedImage:
    """Return a finished image with its parameters, as a member of the response."""
    params = accepted.images[result.position]
    return GeneratedImage(
        b64_json=base64.b64encode(_encode(form, accepted, params, result)).decode(),
        class_=_class_name(accepted, params),
        class_index=params.class_index,
        seed=params.seed,
        image_index=params.image_index,
        steps=params.num_steps,
        start_timestep=_start_timestep(accepted, params),
        upsampled=_upsampled(accepted, result),
        queue_ms=round(result.queue_s * 1000, 3),
        compute_ms=round(result.compute_s * 1000, 3),
    )


def _encode(form: Form, accepted: Accepted, params: ImageParams, result: ImageResult) -> bytes:
    return encode_one(
        accepted.pixels(result), params.class_index, form.format, quality=form.quality, compression=form.compression
    )


def _start_timestep(accepted: Accepted, params: ImageParams) -> int | None:
    if params.given is None or params.given.image is None:
        return None
    return int(build_chain(accepted.model.config.diffusion, params.plan).timesteps[0])


def _upsampled(accepted: Accepted, result: ImageResult) -> Upsampled | None:
    then, stages = accepted.ticket.request.then, accepted.model.stages
    if then is None or stages is None:
        return None
    params = then.images[result.position]
    return Upsampled(model=stages[1].name, steps=params.num_steps, seed=params.seed)


def _class_name(accepted: Accepted, params: ImageParams) -> str | None:
    names = accepted.model.class_names
    return None if names is None or params.class_index is None else names[params.class_index]


def _preferred(accept: str, wanted: ImageFormat) -> tuple[Body, ImageFormat]:
    """Return the form that the Accept header prefers; `wanted` is the format that the body names."""
    formats = {MEDIA_TYPES[name]: name for name in sorted(MEDIA_TYPES, key=lambda name: name != wanted)}
    media_type = preferred(accept, JSON_MEDIA_TYPE, [*formats, ZIP_MEDIA_TYPE])
    if media_type is None:
        raise NotAcceptable(accept, [JSON_MEDIA_TYPE, *MEDIA_TYPES.values(), ZIP_MEDIA_TYPE])
    if media_type in formats:
        return "file", formats[media_type]
    return "zip" if media_type == ZIP_MEDIA_TYPE else "json", wanted
