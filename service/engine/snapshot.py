"""Snapshot: what the engine's thread publishes of itself for the event loop. Frozen: replaced, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from service.engine.request import Image, Priority
from service.engine.step_costs import Costs


class StartedImage(NamedTuple):
    """An image that has started, at the time of a snapshot; fields are those of `Image`."""

    request_id: str
    position: int
    model: str
    client: str
    priority: Priority
    rows: int
    classified_rows: int
    order: tuple[float, int]
    remaining_row_steps: int

    @classmethod
    def of(cls, image: Image) -> StartedImage:
        """Copy what a forecast needs of an image."""
        return cls(
            image.request_id,
            image.position,
            image.model,
            image.client,
            image.priority,
            image.rows,
            image.classified_rows,
            image.order,
            image.remaining_row_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An engine between two of its actions.

    Steps count as taken from their launch: the numbers are ahead of the device by those that are under way, one, or
    `depth` and one more.
    """

    started: tuple[StartedImage, ...]
    """Images that have started, with or without a slot, of all models.

    Images that end stay until their results have been delivered, and perhaps a step longer, so that nobody who reads
    this takes them for images that have not started.
    """
    steps: Mapping[str, int]
    """Steps that each model has taken."""
    widths: Mapping[str, int]
    costs: Mapping[str, Costs]
