"""`stream: true` in OpenAI's Images interface: previews and images, under the names their SDK knows."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from fastapi.sse import format_sse_event

from service.encoding import encode_one
from service.engine.events import ImageDone, Preview
from service.engine.request import ImageResult
from service.errors import GenerationFailed
from service.http.door.observe import ended_as
from service.http.execution import Accepted, encode_answer, follow
from service.http.faults import as_openai_error
from service.http.native.answers import Form, generated_image
from service.http.openai.schemas import CompletedEvent, OpenAIError, PartialImageEvent
from service.http.problems import fault_of
from service.http.state import ServiceState
from service.models.served_model import ServedModel


async def stream_images(accepted: Accepted, form: Form, request: Request, state: ServiceState) -> AsyncGenerator[bytes]:
    """Yield a watched request's previews and images, framed, or the error that ends it. Close it to free its rows."""
    shown: Counter[int] = Counter()
    try:
        async with aclosing(follow(accepted.ticket, state)) as events:
            async for event in events:
                if isinstance(event, Preview):
                    yield await state.encoding.run(_partial, form, accepted, event, shown[event.position])
                    shown[event.position] += 1
                elif isinstance(event, ImageDone):
                    yield await encode_answer(state, _completed, form, accepted, event.result)
                    state.metrics.images.inc()
    except GenerationFailed as error:
        fault = fault_of(error, request)
        ended_as(request.scope, fault.status)
        # The SDK raises for an event with such a member, whatever its name
        told = OpenAIError.model_validate({"error": as_openai_error(fault)})
        yield format_sse_event(event="error", data_str=told.model_dump_json())


def image_size(model: ServedModel) -> str:
    """Return what OpenAI calls the size of a model's images."""
    return f"{model.config.model.image_size}x{model.config.model.image_size}"


def _partial(form: Form, accepted: Accepted, preview: Preview, index: int) -> bytes:
    class_index = accepted.images[preview.position].class_index
    picture = encode_one(preview.pixels, class_index, form.format, quality=form.quality, compression=form.compression)
    event = PartialImageEvent.model_validate(
        {
            "created_at": int(time.time()),
            "position": preview.position,
            "output_format": form.format,
            "size": image_size(accepted.model),
            "b64_json": base64.b64encode(picture).decode(),
            "partial_image_index": index,
            "step": preview.step,
            "steps": preview.steps,
            "eta_s": preview.eta_s,
        }
    )
    return format_sse_event(event=event.type, data_str=event.model_dump_json())


def _completed(form: Form, accepted: Accepted, result: ImageResult) -> bytes:
    event = CompletedEvent.model_validate(
        {
            "created_at": int(time.time()),
            "position": result.position,
            "output_format": form.format,
            "size": image_size(accepted.model),
            **generated_image(form, accepted, result).model_dump(by_alias=True),
        }
    )
    return format_sse_event(event=event.type, data_str=event.model_dump_json(by_alias=True))
