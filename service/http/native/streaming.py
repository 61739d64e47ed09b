"""Write the events of a request with `stream: true` as Server-Sent Events."""

from __future__ import annotations

import base64

from fastapi.sse import format_sse_event
from pydantic import BaseModel

from service.encoding import CHANNELS, encode_one
from service.engine.events import Completed, Event, ImageDone, Queued
from service.engine.request import ImagePreview, ImageProgress, ImageResult
from service.http.execution import Accepted, Finished, deliver
from service.http.faults import Fault, as_problem
from service.http.native.answers import Form, answer_json
from service.http.native.event_schemas import EventName, PreviewEvent, PreviewFormat, ProgressEvent, QueuedEvent
from service.http.native.schemas import Problem
from service.http.state import ServiceState


class NativeEvents:
    """Writes the events of one stream; the last one is `completed` or `failed`."""

    def __init__(self, form: Form, state: ServiceState, accepted: Accepted) -> None:
        self._form = form
        self._state = state
        self._accepted = accepted
        self._results: dict[int, ImageResult] = {}
        self._written = 0

    async def event(self, event: Event) -> bytes | None:
        """Return the framed event."""
        match event:
            case Queued(images_ahead=ahead, wait_s=wait_s, eta_s=eta_s):
                return self._framed("queued", QueuedEvent(images_ahead=ahead, predicted_wait_s=wait_s, eta_s=eta_s))
            case ImageProgress(position=position, step=step, steps=steps, eta_s=eta_s):
                progress = ProgressEvent(position=position, step=step, steps=steps, eta_s=eta_s)
                return self._framed("progress", progress)
            case ImagePreview():
                return self._framed("preview", await self._state.encoding.run(_preview, event, self._form))
            case ImageDone(position=position, result=result, eta_s=eta_s):
                self._results[position] = result
                steps = self._accepted.ticket.request.num_steps(position)
                done = ProgressEvent(position=position, step=steps, steps=steps, eta_s=eta_s)
                return self._framed("progress", done)
            case Completed():
                results = [self._results[position] for position in range(len(self._results))]
                finished = Finished(self._accepted, results, self._accepted.timing(results))
                text = await deliver(self._state, len(results), answer_json, self._form, finished)
                return self._framed("completed", text)
        return None

    def failure(self, fault: Fault) -> bytes:
        """Return the event `failed`, whose data is a problem."""
        return self._framed("failed", Problem.model_validate(as_problem(fault)))

    def _framed(self, name: EventName, data: str | BaseModel) -> bytes:
        self._written += 1
        text = data if isinstance(data, str) else data.model_dump_json(exclude_none=True)
        return format_sse_event(event=name, data_str=text, id=str(self._written))


def _preview(preview: ImagePreview, form: Form) -> str:
    preview_format: PreviewFormat
    if form.format == "npz" or form.format == "npy":  # mypy narrows no `in`
        preview_format = "png" if preview.pixels.shape[2] in CHANNELS["png"] else "npy"
    else:
        preview_format = form.format
    content = encode_one(preview.pixels, None, preview_format, quality=form.quality, compression=form.compression)
    event = PreviewEvent(
        position=preview.position,
        step=preview.step,
        steps=preview.steps,
        eta_s=preview.eta_s,
        format=preview_format,
        b64_json=base64.b64encode(content).decode(),
    )
    return event.model_dump_json()
