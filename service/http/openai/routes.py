"""Routes of OpenAI's Images interface: convert a request to a native one, and the answer to OpenAI's schema."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import Response

from diffusion.quoting import quoted
from service.engine.request import Watch
from service.errors import InvalidRequest
from service.http.event_source import MEDIA_TYPE as EVENT_STREAM
from service.http.execution import Finished, answer_as_stream, answer_when_done, prepare
from service.http.interfaces import OpenAIRoute
from service.http.native.answers import Form, form_of, generated_image
from service.http.native.event_schemas import ONE_EVENT
from service.http.openai.edit_form import given_of, read_edit
from service.http.openai.schemas import (
    CompletedEvent,
    EditRequest,
    ImagesRequest,
    ImagesResponse,
    OpenAIError,
    PartialImageEvent,
)
from service.http.openai.streaming import Kind, OpenAIEvents, image_size
from service.http.openapi import inlined, one_of
from service.http.state import ServiceState, service_state
from service.models.served_model import ServedModel, find_model
from service.requests.generate_request import MAX_IMAGES, GenerateRequest, SamplingOptions, UseOfGiven

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {EVENT_STREAM: {"schema": {"description": ONE_EVENT, **one_of(PartialImageEvent, CompletedEvent)}}}
    },
    "4XX": {
        "model": OpenAIError,
        "description": "A field breaks a rule (400), no such model (404), too much of this client is in flight (429)",
    },
    "5XX": {
        "model": OpenAIError,
        "description": "Queue full or shutting down (503), an image or the engine failed, or it took too long",
    },
}

_EDIT_BODY = {"required": True, "content": {"multipart/form-data": {"schema": inlined(EditRequest)}}}
_NATIVE_FIELDS = {*SamplingOptions.model_fields, *UseOfGiven.model_fields}

router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAIRoute)

State = Annotated[ServiceState, Depends(service_state)]


@router.post("/images/generations", response_model=ImagesResponse, responses=_RESPONSES)
async def generate_images(body: ImagesRequest, request: Request, state: State) -> Response:
    """Generate images of classes; with `stream`, previews and images come as Server-Sent Events."""
    model = find_model(state.models, body.model)
    return await _answered("image_generation", body, native_request(body, model), request, state)


@router.post(
    "/images/edits",
    response_model=ImagesResponse,
    responses=_RESPONSES,
    openapi_extra={"requestBody": _EDIT_BODY},
)
async def edit_images(request: Request, state: State) -> Response:
    """Make the transparent pixels of `mask`, or of `image`, anew; with `strength`, begin with the image.

    Fields as for generations, and `strength`, `start_timestep`, `resample` and `fit` of the native interface.
    """
    content_type = request.headers.get("content-type", "")
    body = await state.encoding.run(read_edit, content_type, await request.body())
    while True:
        model = find_model(state.models, body.model)
        native = native_request(body, model)
        given = await state.encoding.run(given_of, body, model.config)
        if find_model(state.models, body.model) is model:  # else it was reloaded meanwhile: other classes may apply
            break
    return await _answered("image_edit", body, native.model_copy(update=given), request, state)


async def _answered(
    kind: Kind, body: ImagesRequest, native: GenerateRequest, request: Request, state: ServiceState
) -> Response:
    prepared = await prepare(native, request, state)
    form = form_of(native, "application/json", prepared.model.result_config.model.image_channels)
    if body.stream:
        watch = _watch(body.partial_images, prepared.request.num_steps(0))
        return answer_as_stream(prepared, watch, request, state, partial(OpenAIEvents, kind, form, state))
    answered = await answer_when_done(prepared, request, state, partial(_answer, form))
    return answered.response


def native_request(body: ImagesRequest, model: ServedModel) -> GenerateRequest:
    """Return the native request for a request of OpenAI's.

    Raises:
        InvalidRequest: one of OpenAI's fields breaks a rule; the message names field, rule and allowed values.
        RequestValidationError: a field of the native interface breaks a rule.
    """
    if body.size is not None and body.size not in ("auto", image_size(model)):
        raise InvalidRequest("size", f"must be {image_size(model)} or auto; got {quoted(body.size)}")
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images", "is valid only with `stream`")
    fields: dict[str, Any] = body.model_dump(include=_NATIVE_FIELDS, exclude_unset=True)
    fields |= {"model": model.name, "n": body.n, "format": body.output_format or "png"}
    if body.output_compression is not None and fields["format"] == "jpeg":
        fields["quality"] = max(1, body.output_compression)
    if body.prompt.strip():
        fields |= _classes(body, model)
    try:
        return GenerateRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _classes(body: ImagesRequest, model: ServedModel) -> dict[str, Any]:
    """Return `class` and `n`: the classes that the prompt lists, repeated until there are n."""
    if model.classes is None:
        raise InvalidRequest("prompt", f"must be empty: model {quoted(model.name)} is unconditional")
    classes = model.classes.in_prompt(body.prompt, MAX_IMAGES)
    n = body.n or len(classes)
    if n % len(classes):
        raise InvalidRequest("n", f"must be a multiple of {len(classes)}, the classes in `prompt`; got {n}")
    return {"class": classes * (n // len(classes)), "n": n}


def _watch(partial_images: int | None, num_steps: int) -> Watch:
    """Return a watch for at most this many previews of an image, spread evenly over its steps."""
    return Watch(preview_every=math.ceil(num_steps / (partial_images + 1)) if partial_images else None)


def _answer(form: Form, finished: Finished) -> Response:
    accepted = finished.accepted
    response = ImagesResponse.model_validate(
        {
            "created": int(time.time()),
            "data": [generated_image(form, accepted, result) for result in finished.results],
            "output_format": form.format,
            "size": image_size(accepted.model),
            "model": accepted.model.name,
            "numerics_id": accepted.model.numerics_id,
            "timing": finished.timing,
        }
    )
    return Response(response.model_dump_json(by_alias=True), media_type="application/json")
