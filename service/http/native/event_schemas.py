"""Schemas of the events of `stream: true`; `completed` is a `GenerateResponse`, `failed` a `Problem`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from formats.images import PictureFormat
from service.http.native.schemas import Problem

PreviewFormat = PictureFormat | Literal["npy"]
EventName = Literal["queued", "progress", "preview", "completed", "failed"]


class QueuedEvent(BaseModel):
    """The request was accepted; repeated about every second until the first step of its first image."""

    images_ahead: int = Field(description="Number of images before this request's first one in the queue.")
    predicted_wait_s: float = Field(description="From now to its first network call.")
    eta_s: float = Field(description="From now to its last image; 0 before any step was timed.")


class ProgressEvent(BaseModel):
    """Progress of an image. Not every step is reported, but the last one always is."""

    position: int = Field(description="Position of the image in the request, from 0.")
    step: int = Field(description="Sampling steps taken.")
    steps: int
    eta_s: float = Field(description="From now to the request's last image.")


class PreviewEvent(BaseModel):
    """Preview: the finished image as predicted after some of its steps."""

    position: int
    step: int
    steps: int
    eta_s: float
    format: PreviewFormat = Field(
        description="The request's; for `npz` and `npy` it is `png`, or `npy` if a picture cannot hold the channels."
    )
    b64_json: str = Field(description="The file, base64.")


ONE_EVENT = "One event; the answer is a sequence of them."
"""OpenAPI 3.1 has no keyword for the items of a stream (3.2: `itemSchema`); by convention `schema` describes one."""
_COMPONENT = "#/components/schemas/{model}"
_DATA: dict[EventName, dict[str, Any]] = {
    "queued": QueuedEvent.model_json_schema(),
    "progress": ProgressEvent.model_json_schema(),
    "preview": PreviewEvent.model_json_schema(),
    "completed": {"$ref": _COMPONENT.format(model="GenerateResponse")},
    "failed": Problem.model_json_schema(),
}
EVENT_SCHEMA: dict[str, Any] = {
    "description": ONE_EVENT,
    "oneOf": [
        {
            "type": "object",
            "required": ["event", "data", "id"],
            "properties": {
                "event": {"const": name},
                "id": {"type": "string", "description": "Counts the events of this answer, from 1."},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
            },
        }
        for name, data in _DATA.items()
    ],
}
