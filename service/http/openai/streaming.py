"""Write the streams of OpenAI's Images interface: previews and images as its SDK reads them."""

from __future__ import annotations

import base64
import time
from collections import Counter
from typing import Literal

from fastapi.sse import format_sse_event

from service.encoding import encode_one
from service.engine.events import Event, ImageDone
from service.engine.request import ImagePreview, ImageResult
from service.http.execution import Accepted, deliver
from service.http.faults import Fault, as_openai_error
from service.http.native.answers import Form, generated_image
from service.http.openai.schemas import CompletedEvent, OpenAIError, PartialImageEvent
from service.http.state import ServiceState
from service.models.served_model import ServedModel

Kind = Literal["image_generation", "image_edit"]
"""Of request, in the names of its events."""


class OpenAIEvents:
    """Writes the previews and images of one stream; other events are not shown."""

    def __init__(self, kind: Kind, form: Form, state: ServiceState, accepted: Accepted) -> None:
        self._kind = kind
        self._form = form
        self._state = state
        self._accepted = accepted
        self._shown: Counter[int] = Counter()
        """Previews written, by image."""

    async def event(self, event: Event) -> bytes | None:
        """Return the framed preview or image."""
        if isinstance(event, ImagePreview):
            index = self._shown[event.position]
            self._shown[event.position] += 1
            return await self._state.encoding.run(_partial, self._kind, self._form, self._accepted, event, index)
        if isinstance(event, ImageDone):
            return await deliver(self._state, 1, _completed, self._kind, self._form, self._accepted, event.result)
        return None

    def failure(self, fault: Fault) -> bytes:
        """Return the event `error`. OpenAI's SDK raises for any event with a member `error`."""
        error = OpenAIError.model_validate({"error": as_openai_error(fault)})
        return format_sse_event(event="error", data_str=error.model_dump_json())


def image_size(model: ServedModel) -> str:
    """Return the size of a model's images in OpenAI's notation, width x height, such as 32x32."""
    return f"{model.result_config.model.image_width}x{model.result_config.model.image_height}"


def _partial(kind: Kind, form: Form, accepted: Accepted, preview: ImagePreview, index: int) -> bytes:
    class_index = accepted.images[preview.position].class_index
    picture = encode_one(preview.pixels, class_index, form.format, quality=form.quality, compression=form.compression)
    height, width, _ = preview.pixels.shape  # of a cascade's base, in its first stage
    event = PartialImageEvent.model_validate(
        {
            "type": f"{kind}.partial_image",
            "created_at": int(time.time()),
            "position": preview.position,
            "output_format": form.format,
            "size": f"{width}x{height}",
            "b64_json": base64.b64encode(picture).decode(),
            "partial_image_index": index,
            "step": preview.step,
            "steps": preview.steps,
            "eta_s": preview.eta_s,
        }
    )
    return format_sse_event(event=event.type, data_str=event.model_dump_json())


def _completed(kind: Kind, form: Form, accepted: Accepted, result: ImageResult) -> bytes:
    event = CompletedEvent.model_validate(
        {
            "type": f"{kind}.completed",
            "created_at": int(time.time()),
            "position": result.position,
            "output_format": form.format,
            "size": image_size(accepted.model),
            **generated_image(form, accepted, result).model_dump(by_alias=True),
        }
    )
    return format_sse_event(event=event.type, data_str=event.model_dump_json(by_alias=True))
