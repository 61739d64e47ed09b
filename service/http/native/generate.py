"""POST /v1/generate: images as one answer or as a stream of events."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.encoding import MEDIA_TYPES, ZIP_MEDIA_TYPE
from service.engine.request import Watch
from service.http.event_source import MEDIA_TYPE as EVENT_STREAM
from service.http.execution import answer_as_stream, answer_when_done, prepare
from service.http.interfaces import NativeRoute
from service.http.native.answers import answer, form_of, refuse_large_grid
from service.http.native.event_schemas import EVENT_SCHEMA
from service.http.native.schemas import GenerateResponse, Problem
from service.http.native.streaming import NativeEvents
from service.http.state import ServiceState, service_state
from service.requests.generate_request import GenerateRequest

router = APIRouter(prefix="/v1", tags=["generate"], route_class=NativeRoute)

State = Annotated[ServiceState, Depends(service_state)]

_EXAMPLE = {"images": [], "model": "fashion32", "numerics_id": "0123456789abcdef", "timing": {}}
FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
    for status, text in {
        400: "The body is not JSON",
        401: "No valid API key, if the service requires one",
        404: "No such model",
        406: "Accept allows no available form",
        408: "The request did not arrive in time",
        413: "The body is too long",
        415: "The body is not declared as JSON",
        421: "Not a name of this service",
        422: "A field breaks a rule, the deadline cannot be met, or the Idempotency-Key is another request's",
        429: "This client has too many images in flight or requests too often; Retry-After gives the time to wait",
        431: "The headers are too long",
        500: "An image or the engine failed",
        503: "Queue full or shutting down; Retry-After gives the time to wait",
        504: "It took longer than the service allows",
    }.items()
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/json": {"example": _EXAMPLE},
            EVENT_STREAM: {"schema": EVENT_SCHEMA},
            **dict.fromkeys([*MEDIA_TYPES.values(), ZIP_MEDIA_TYPE], FILE),
        }
    },
    **ERRORS,
}


@router.post("/generate", response_model=GenerateResponse, responses=_RESPONSES)
async def generate(body: GenerateRequest, request: Request, state: State) -> Response:
    """Generate images.

    The answer is JSON with base64 images unless Accept prefers a file: `image/png`, `image/webp` or `image/jpeg` for
    the picture itself (a grid if there are several), `application/zip` for one picture per image, `application/x-npz`
    for arrays.
    With `stream`, the answer is Server-Sent Events: `queued` at once and while the request waits, then `progress` and
    `preview` of its images, and last `completed`, with the content of the JSON answer, or `failed`, with a problem.
    """
    prepared = await prepare(body, request, state)
    channels = prepared.model.result_config.model.image_channels
    form = form_of(body, ", ".join(request.headers.getlist("accept")), channels)
    refuse_large_grid(form, len(prepared.request.images), prepared.model.result_config.model)
    if body.stream:
        watch = Watch(preview_every=body.preview_every)
        return answer_as_stream(prepared, watch, request, state, partial(NativeEvents, form, state))
    answered = await answer_when_done(prepared, request, state, partial(answer, form))
    answered.response.headers["Server-Timing"] = answered.server_timing
    return answered.response
