"""Sample images with the service's engine, without HTTP and in the calling thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from service.backends.base import Denoiser
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, ImageParams, ImageStatus, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from trainer.data import Uint8Array

MODEL = "model"


class EngineSampler:
    """A denoiser behind an engine of a width, warmed up: self-test, first step."""

    def __init__(self, denoiser: Denoiser[Any], width: int) -> None:
        self.description = denoiser.description
        settings = EngineConfig(max_rows=width)
        self._engine = Engine({MODEL: ArrayRunner(denoiser, settings)}, settings, Metrics())
        self._engine.warm_up()

    def __call__(
        self,
        steps: int,
        labels: Sequence[int | None],
        cfg_scale: float = 1.0,
        on_image: Callable[[], object] = lambda: None,
        sampler: str = "ancestral",
    ) -> Uint8Array:
        """Sample image k from seed k and class labels[k]: uint8 [N, H, W, C].

        Args:
            steps: length of every chain.
            labels: a class for each image; None where the model is unconditional.
            cfg_scale: classifier-free guidance; 1 = off.
            on_image: called whenever an image is finished.
            sampler: a name of `diffusion.plans.SAMPLERS`.

        Raises:
            RuntimeError: an image has values that are not finite.
        """
        key = PlanKey(sampler=sampler, spec=str(steps))
        images = tuple(
            ImageParams(plan=key, num_steps=steps, seed=k, image_index=0, class_index=label, cfg_scale=cfg_scale)
            for k, label in enumerate(labels)
        )
        self._engine.add(GenerationRequest(request_id="all", model=MODEL, images=images), time.monotonic())
        pixels: dict[int, Uint8Array] = {}
        while self._engine.has_work():
            for result in self._engine.step():
                if result.status is not ImageStatus.DONE or result.pixels is None:
                    raise RuntimeError(f"{self.description}: image {result.position} {result.status.value}")
                pixels[result.position] = result.pixels
                on_image()
        return np.stack([pixels[k] for k in range(len(images))])
