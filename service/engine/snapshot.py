"""Snapshot: what the engine's thread publishes of itself for the event loop. Frozen: replaced, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

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


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An engine between two of its actions.

    Steps count as taken from their launch: the numbers are ahead of the device by those that are under way, one, or
    `depth` and one more.
    """

    images: Sequence[Image]
    """Images that have started, with or without a slot, of all models.

    Images that end stay until their results have been delivered, and perhaps a step longer, so that nobody who reads
    this takes them for images that have not started.
    """
    orders: Sequence[tuple[float, int]]
    """Of each of them, its order."""
    remaining: Sequence[int]
    """Of each of them, its row-steps left."""
    steps: Mapping[str, int]
    """Steps that each model has taken."""
    widths: Mapping[str, int]
    costs: Mapping[str, Costs]

    @classmethod
    def of(
        cls,
        images: Iterable[Image],
        steps: Mapping[str, int],
        widths: Mapping[str, int],
        costs: Mapping[str, Costs],
    ) -> Self:
        """Return a snapshot of images as they are now; taken at every step, so it does as little as it can."""
        kept = tuple(dict.fromkeys(images))
        return cls(
            images=kept,
            orders=[image.order for image in kept],
            remaining=[image.remaining_row_steps for image in kept],
            steps=steps,
            widths=widths,
            costs=costs,
        )

    @cached_property
    def started(self) -> tuple[StartedImage, ...]:
        """The images as they were then, put together by whoever reads it: all else of an image never changes."""
        return tuple(
            StartedImage(
                i.request_id, i.position, i.model, i.client, i.priority, i.rows, i.classified_rows, order, remaining
            )
            for i, order, remaining in zip(self.images, self.orders, self.remaining, strict=True)
        )
