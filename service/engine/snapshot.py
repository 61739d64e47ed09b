"""Snapshot: what the engine's thread publishes of itself for the event loop. Frozen: replaced, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from service.engine.request import Image, Order
from service.engine.step_costs import Costs


class PlacedImage(NamedTuple):
    """An image with what changes of it, at one moment."""

    image: Image
    order: Order
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
    orders: Sequence[Order]
    """Of each of them, its order."""
    steps_done: Sequence[int]
    """Of each of them, the steps that it has taken."""
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
        """Return a snapshot of images as they are now, each named once; taken at every step, so it does little."""
        kept = tuple(images)
        return cls(
            images=kept,
            orders=[image.order for image in kept],
            steps_done=[image.steps_done for image in kept],
            steps=steps,
            widths=widths,
            costs=costs,
        )

    @property
    def remaining(self) -> list[int]:
        """Return the row-steps left of each of them."""
        done = zip(self.images, self.steps_done, strict=True)
        return [image.row_steps - image.rows * steps for image, steps in done]

    @cached_property
    def started(self) -> tuple[PlacedImage, ...]:
        """The images as they were then, put together by whoever reads it: all else of an image never changes."""
        return tuple(map(PlacedImage, self.images, self.orders, self.remaining))
