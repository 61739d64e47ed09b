"""`stream: true`: what happens to a request, as Server-Sent Events."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from formats.images import PictureFormat, encode
from service.engine.events import Completed, ImageDone, Preview, Progress, Queued
from service.engine.request import ImageResult
from service.errors import GenerationFailed
from service.http.door.observe import ended_as
from service.http.execution import Accepted, encode_answer, follow
from service.http.faults import as_problem
from service.http.native.answers import Form, answer_json
from service.http.native.event_schemas import EventName, PreviewEvent, ProgressEvent, QueuedEvent
from service.http.native.schemas import Problem
from service.http.problems import fault_of
from service.http.state import ServiceState


async def stream_events(accepted: Accepted, form: Form, request: Request, state: ServiceState) -> AsyncGenerator[bytes]:
    """Yield the events of a watched request, framed; `completed` or `failed` is the last. Close it to free its rows."""
    number = 0

    def framed(name: EventName, data: str | BaseModel) -> bytes:
        nonlocal number
        number += 1
        text = data if isinstance(data, str) else data.model_dump_json(exclude_none=True)
        return format_sse_event(event=name, data_str=text, id=str(number))

    results: dict[int, ImageResult] = {}
    try:
        async with aclosing(follow(accepted.ticket, state)) as events:
            async for event in events:
                match event:
                    case Queued(images_ahead=ahead, wait_s=wait_s, eta_s=eta_s):
                        yield framed("queued", QueuedEvent(images_ahead=ahead, predicted_wait_s=wait_s, eta_s=eta_s))
                    case Progress(position=position, step=step, steps=steps, eta_s=eta_s):
                        yield framed("progress", ProgressEvent(position=position, step=step, steps=steps, eta_s=eta_s))
                    case Preview():
                        yield framed("preview", await state.encoding.run(_preview, event, form))
                    case ImageDone(position=position, result=result, eta_s=eta_s):
                        results[position] = result
                        steps = accepted.images[position].num_steps
                        yield framed("progress", ProgressEvent(position=position, step=steps, steps=steps, eta_s=eta_s))
                    case Completed():
                        in_order = [results[position] for position in range(len(results))]
                        timing = accepted.timing(in_order)
                        answer = await encode_answer(state, answer_json, form, accepted, in_order, timing)
                        state.metrics.images.inc(len(in_order))
                        yield framed("completed", answer)
    except GenerationFailed as error:
        problem = Problem.model_validate(as_problem(fault_of(error, request)))
        ended_as(request.scope, problem.status)
        yield framed("failed", problem)


def _preview(preview: Preview, form: Form) -> str:
    picture_format: PictureFormat = "png" if form.format == "npz" else form.format
    picture = encode(preview.pixels, picture_format, quality=form.quality, compression=form.compression)
    event = PreviewEvent(
        position=preview.position,
        step=preview.step,
        steps=preview.steps,
        eta_s=preview.eta_s,
        format=picture_format,
        b64_json=base64.b64encode(picture).decode(),
    )
    return event.model_dump_json()
