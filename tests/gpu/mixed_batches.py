"""The guarantee on a device: an image has the same pixels alone and in a mixed batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from service.backends.base import Denoiser
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageResult
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from tests.fakes import generation, params


def assert_pixels_do_not_depend_on_other_images(denoiser: Denoiser[Any], config: EngineConfig) -> None:
    """Sample five images of different lengths, some of them guided, together and each alone; compare the pixels."""
    runner: ArrayRunner[Any] = ArrayRunner(denoiser, config)
    runner.warm_up()
    images = [params(steps=4 + k, cfg_scale=1.0 + k % 2, seed=k) for k in range(5)]

    def run(*chosen: int) -> list[ImageResult]:
        engine = Engine({"m": runner}, config, Metrics())
        engine.add(generation("r", *(images[k] for k in chosen)), submitted_at=0.0)
        results: list[ImageResult] = []
        while engine.has_work():
            results += engine.step()
        return sorted(results, key=lambda result: result.position)

    for result in run(*range(5)):
        (alone,) = run(result.position)
        assert result.pixels is not None
        assert alone.pixels is not None
        np.testing.assert_array_equal(result.pixels, alone.pixels)
