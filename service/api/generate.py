"""POST /v1/generate: validate, submit, wait for the pictures or for the client to go away, encode."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.api.client import client_of
from service.api.encoding import MEDIA_TYPES, encode_one, encode_picture
from service.api.schemas import GeneratedImage, GenerateRequest, GenerateResponse, ImageFormat, Problem, Timing
from service.api.state import ServiceState, service_state
from service.api.translate import ServedModel, complete, find_model
from service.engine.async_engine import Ticket
from service.engine.request import GenerationRequest, ImageResult
from service.errors import Aborted, TimedOut

router = APIRouter(prefix="/v1", tags=["generate"])

State = Annotated[ServiceState, Depends(service_state)]

_EXAMPLE = {"images": [], "model": "fashion32", "numerics_id": "0123456789abcdef", "timing": {}}
_RESPONSES = {
    200: {
        "content": {
            "application/json": {"example": _EXAMPLE},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/webp": {"schema": {"type": "string", "format": "binary"}},
            "application/x-npz": {"schema": {"type": "string", "format": "binary"}},
        }
    },
    **{
        status: {"description": text, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
        for status, text in {
            400: "The body is not JSON",
            404: "No such model",
            413: "The body is too long",
            415: "The body is not declared as JSON",
            421: "Not a name of this service",
            422: "A field breaks a rule, or the deadline cannot be met",
            429: "This client has too much in flight; Retry-After says when there will be room",
            500: "An image or the engine failed",
            503: "Queue full or shutting down; Retry-After says when to try again",
            504: "It took longer than the service allows",
        }.items()
    },
}


@router.post("/generate", response_model=GenerateResponse, responses=_RESPONSES)  # type: ignore[arg-type]
async def generate(body: GenerateRequest, request: Request, state: State) -> Response:
    """Generate images.

    Answers JSON with base64 images; with `Accept: image/png`, `image/webp` or `application/x-npz` the picture
    itself (a grid if there are several).
    """
    model = find_model(state.models, body.model)
    # An id of our own: two clients may send the same X-Request-ID
    generation = complete(body, model, uuid.uuid4().hex, state.settings.max_row_steps, _client(request, state))
    ticket = state.engine.submit(generation)
    results = await _wait(ticket, request, state)
    timing = _timing(ticket, results)
    answer = await asyncio.to_thread(_answer, body, request, model, generation, results, timing)
    state.metrics.images.inc(len(results))
    return answer


def _client(request: Request, state: ServiceState) -> str:
    peer = "" if request.client is None else request.client.host
    return client_of(peer, request.headers.getlist("x-forwarded-for"), state.settings.trusted_proxies)


async def _wait(ticket: Ticket, request: Request, state: ServiceState) -> list[ImageResult]:
    """Wait for the images; frees the rows when the client goes away, any image fails or it takes too long."""
    longest = state.settings.max_request_s
    images = asyncio.gather(*ticket.images)
    images.add_done_callback(_retrieve)
    gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
    try:
        either: list[asyncio.Future[Any]] = [images, gone]
        done, _ = await asyncio.wait(either, timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimedOut(f"the images were not done within {longest:g} s, the longest that the service allows")
        if not images.done():
            raise Aborted("the client closed the connection")
        return images.result()
    finally:
        gone.cancel()
        _abandon(ticket, images, state)


def _abandon(ticket: Ticket, images: asyncio.Future[list[ImageResult]], state: ServiceState) -> None:
    if not all(future.done() for future in ticket.images):
        images.cancel()
        state.engine.abort(ticket.request.request_id)


def _retrieve(images: asyncio.Future[list[ImageResult]]) -> None:
    """Look at the outcome, which nobody else does once the client has gone."""
    if not images.cancelled():
        images.exception()


async def _disconnected(request: Request) -> None:
    """Return when the client has gone; the body has been read, so that is all there is left to receive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(
    body: GenerateRequest,
    request: Request,
    model: ServedModel,
    generation: GenerationRequest,
    results: list[ImageResult],
    timing: Timing,
) -> Response:
    pixels = [result.pixels for result in results if result.pixels is not None]
    params = generation.images
    if (accepted := _accepted_picture(request, body.format)) is not None:
        content = encode_picture(np.stack(pixels), [p.class_index for p in params], accepted)
        headers = {"X-Seed": str(params[0].seed), "X-Numerics-Id": model.numerics_id}
        return Response(content, media_type=MEDIA_TYPES[accepted], headers=headers)
    names = model.class_names
    images = [
        GeneratedImage(
            b64_json=base64.b64encode(encode_one(image, p.class_index, body.format)).decode(),
            class_=None if names is None or p.class_index is None else names[p.class_index],
            class_index=p.class_index,
            seed=p.seed,
            image_index=p.image_index,
            steps=p.num_steps,
            queue_ms=round(result.queue_s * 1000, 3),
            compute_ms=round(result.compute_s * 1000, 3),
        )
        for image, p, result in zip(pixels, params, results, strict=True)
    ]
    response = GenerateResponse(model=model.name, images=images, numerics_id=model.numerics_id, timing=timing)
    return Response(response.model_dump_json(by_alias=True), media_type="application/json")


def _timing(ticket: Ticket, results: list[ImageResult]) -> Timing:
    predicted = ticket.prediction
    return Timing(
        images_ahead=predicted.position,
        predicted_wait_s=round(predicted.wait_s, 6),
        wait_s=round(min(result.queue_s for result in results), 6),
        predicted_finish_s=round(predicted.finish_s, 6),
        finish_s=round(time.monotonic() - ticket.submitted_at, 6),
    )


def _accepted_picture(request: Request, wanted: ImageFormat) -> ImageFormat | None:
    """Return the picture format that the Accept header names first; None for JSON."""
    for part in request.headers.get("accept", "").split(","):
        media_type = part.partition(";")[0].strip().lower()
        if media_type in ("application/json", "*/*"):
            return None
        if media_type == "image/*":
            return "png" if wanted == "npz" else wanted
        for image_format, known in MEDIA_TYPES.items():
            if media_type == known:
                return image_format
    return None
