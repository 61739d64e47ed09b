"""POST /v1/generate: validate, submit, wait for the pictures or for the client to go away, encode."""

from __future__ import annotations

import base64
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from service.api.encoding import MEDIA_TYPES, encode_one, encode_picture
from service.api.execution import Accepted, prepare, submit, wait
from service.api.schemas import GeneratedImage, GenerateRequest, GenerateResponse, ImageFormat, Problem, Timing
from service.api.state import ServiceState, service_state
from service.engine.request import ImageResult

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
    accepted = submit(prepare(body, request, state), state)
    results = await wait(accepted.ticket, request, state)
    timing = accepted.timing(results)
    answer = await state.encoding.run(_answer, body, request, accepted, results, timing)
    state.metrics.images.inc(len(results))
    return answer


def _answer(
    body: GenerateRequest,
    request: Request,
    accepted: Accepted,
    results: list[ImageResult],
    timing: Timing,
) -> Response:
    pixels = [result.pixels for result in results if result.pixels is not None]
    model, params = accepted.model, accepted.images
    if (wanted := _accepted_picture(request, body.format)) is not None:
        content = encode_picture(np.stack(pixels), [p.class_index for p in params], wanted)
        headers = {"X-Seed": str(params[0].seed), "X-Numerics-Id": model.numerics_id}
        return Response(content, media_type=MEDIA_TYPES[wanted], headers=headers)
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
