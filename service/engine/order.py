"""ServiceOrder: compute the order in which images are served, at arrival and after each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from service.engine.config import EngineConfig
from service.engine.policies import CHANGE_WITH_STEPS, policy_named
from service.engine.request import GenerationRequest, Image


class ServiceOrder:
    """Orders images by the number that the policy assigns to them, least first, and then by arrival.

    Arrival numbers are unique within one instance, so all images of a scheduler must come from the same one.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._policy = policy_named(config.policy, config.ageing)
        self._changes = config.policy in CHANGE_WITH_STEPS
        self._arrivals = itertools.count()

    def images_of(self, request: GenerationRequest, submitted_at: float, steps: Mapping[str, int]) -> list[Image]:
        """Return the new images of a request, with arrival numbers after all earlier ones.

        Args:
            request: a request to be accepted or, after a prediction, rejected; arrival numbers may therefore have gaps.
            submitted_at: time.monotonic() at admission.
            steps: steps that each model has taken; it has those of the request.
        """
        images = [Image(request=request, position=k, submitted_at=submitted_at) for k in range(len(request.images))]
        for image in images:
            self.arrive(image, steps[image.model])
            if image.then is not None:
                self.arrive(image.then, steps[image.then.model])
        return images

    def arrive(self, image: Image, model_steps: int) -> None:
        """Set an image's arrival number, arrival step and first order."""
        image.sequence = next(self._arrivals)
        image.arrival_step = model_steps
        image.order = (self._policy(image), image.sequence)

    def update(self, images: Iterable[Image]) -> None:
        """Update the order of images after they have taken a step."""
        if self._changes:
            for image in images:
                image.order = (self._policy(image), image.sequence)
