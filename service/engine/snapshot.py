"""Snapshot: the state that the engine thread publishes for the event loop. Immutable: replaced, never modified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from service.engine.request import Image, Order
from service.engine.step_costs import Costs


class PlacedImage(NamedTuple):
    """An image with its order and remaining work at one moment."""

    image: Image
    order: Order
    remaining_row_steps: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """State of an engine between two of its actions.

    A step counts as taken once launched. The numbers are therefore ahead of the device by the steps under way: one, or
    up to `depth` + 1.
    """

    images: Sequence[Image]
    """Started images of all models, with or without a slot.

    Images that end stay until their results have been delivered, and possibly one step longer, so that readers do not
    mistake them for images that have not started.
    """
    orders: Sequence[Order]
    """The order of each image."""
    steps_done: Sequence[int]
    """The steps taken by each image."""
    steps: Mapping[str, int]
    """The steps taken by each model."""
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
        """Return a snapshot of the images' current state. Images must be unique. Cheap, because it runs every step."""
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
        """Return the remaining row-steps of each image."""
        done = zip(self.images, self.steps_done, strict=True)
        return [image.row_steps - image.rows * steps for image, steps in done]

    @cached_property
    def started(self) -> tuple[PlacedImage, ...]:
        """Return the images with their state in the snapshot. Computed by the reader, from fields that never change."""
        return tuple(map(PlacedImage, self.images, self.orders, self.remaining))
