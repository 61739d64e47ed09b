"""ServiceOrder: the order in which images are served. It alone derives it, at arrival and after each step."""

from __future__ import annotations

import itertools

from service.engine.config import EngineConfig
from service.engine.policies import CHANGE_WITH_STEPS, policy_named
from service.engine.request import GenerationRequest, Image


class ServiceOrder:
    """Sorts images by the number that their policy gives them, least first, and then by arrival.

    Arrival numbers are unique within one instance, so all images of a scheduler must come from the same one.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._policy = policy_named(config.policy, config.ageing)
        self._changes = config.policy in CHANGE_WITH_STEPS
        self._arrivals = itertools.count()

    def images_of(self, request: GenerationRequest, submitted_at: float, model_steps: int) -> list[Image]:
        """Return a request's images, none of them started; they have arrived later than all others.

        Args:
            request: to be accepted, or refused after a prediction: arrival numbers may have gaps.
            submitted_at: time.monotonic() at admission.
            model_steps: steps that the request's model has taken.
        """
        images = [Image(request=request, position=k, submitted_at=submitted_at) for k in range(len(request.images))]
        for image in images:
            self.arrive(image, model_steps)
        return images

    def arrive(self, image: Image, model_steps: int) -> None:
        """Set an image's arrival and its first order."""
        image.sequence = next(self._arrivals)
        image.arrival_step = model_steps
        image.order = (self._policy(image), image.sequence)

    def update(self, image: Image) -> None:
        """Set an image's order anew, after it has taken a step."""
        if self._changes:
            image.order = (self._policy(image), image.sequence)
