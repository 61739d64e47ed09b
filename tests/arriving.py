"""A scheduler for tests of it alone: without an admission, so images arrive when they are added."""

from __future__ import annotations

from collections.abc import Iterable

from service.engine.request import Image
from service.engine.scheduler import Scheduler


class ArrivingScheduler(Scheduler):
    """Sets the arrival and the order of images that are added."""

    def add(self, images: Iterable[Image]) -> None:
        """Let images arrive, and wait for their first step."""
        arrived = list(images)
        for image in arrived:
            self.order.arrive(image, self.steps(image.model))
        super().add(arrived)
