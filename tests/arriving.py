"""A scheduler for its own tests, without admission: images arrive when they are added."""

from __future__ import annotations

from collections.abc import Iterable

from service.engine.request import Image
from service.engine.scheduler import Scheduler


class ArrivingScheduler(Scheduler):
    """Sets the arrival and the order of added images."""

    def add(self, images: Iterable[Image]) -> None:
        """Set the arrival of images, and let them wait for their first step."""
        arrived = list(images)
        for image in arrived:
            self.order.arrive(image, self.steps(image.model))
        super().add(arrived)
