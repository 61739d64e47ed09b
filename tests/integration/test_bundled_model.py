"""The bundled model is complete and small, and its pixels do not depend on the batch or the width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from formats.checkpoint import load_unet
from formats.precision import PrecisionChoice
from service.backends.base import BackendOptions, Denoiser
from service.backends.openvino_backend import OpenVinoBackend
from service.backends.self_test import invariant_batch_sizes
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageParams, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from tests import bfloat16
from tests.counts import LONG
from tests.fakes import generation
from tests.paths import BUNDLED

MODEL = BUNDLED
MEGABYTE = 1_000_000


ONE_THREAD = pytest.param(1, marks=pytest.mark.skipif(not LONG, reason="as test_engine.py's: IDDPM_TEST_LONG=1"))


@pytest.fixture(params=[ONE_THREAD, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_it_has_class_names_and_a_source_and_is_small() -> None:
    config, _ = load_unet(MODEL)
    assert config.class_names is not None
    assert config.class_names[:2] == ("T-shirt/top", "Trouser")
    assert (config.diffusion.num_timesteps, config.diffusion.variance) == (4000, "learned_range")
    assert {"command", "commit", "images_seen", "data"} <= config.provenance.keys()
    assert all(path.stat().st_size <= 12 * MEGABYTE for path in MODEL.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_rows_are_bit_identical_at_every_compiled_size(precision: PrecisionChoice) -> None:
    if precision == "bf16":
        bfloat16.need_in_openvino()
    options = BackendOptions(max_rows=16, precision=precision, device="cpu", cache_dir="")
    backend: Denoiser[Any] = OpenVinoBackend(MODEL, options)
    assert invariant_batch_sizes(backend, 16) == backend.batch_sizes == (1, 2, 4, 8, 16)


def test_its_pixels_are_the_same_alone_and_in_a_mixed_batch(threads: int) -> None:
    backend, config = TorchBackend(MODEL), EngineConfig()
    runner = ArrayRunner(backend, config)
    runner.warm_up()
    engine = Engine({"m": runner}, config, Metrics())
    rng = np.random.default_rng(threads)
    images = [
        ImageParams(
            plan=PlanKey(sampler="ancestral", spec=str(steps)),
            num_steps=steps,
            seed=int(rng.integers(2**53)),
            image_index=0,
            class_index=k % 10,
            cfg_scale=float(rng.choice([1.0, 2.0])),
        )
        for k, steps in enumerate([2, 5, 3, 4, 6, 2, 3])
    ]
    engine.add(generation("r", *images), submitted_at=0.0)
    results = []
    while engine.has_work():
        results += engine.step()

    _, network = load_unet(MODEL)
    for result in results:
        image = images[result.position]
        plan = build_plan(backend.config.diffusion, "ancestral", str(image.num_steps))
        spec = ImageSpec(seed=image.seed, class_index=image.class_index, cfg_scale=image.cfg_scale)
        assert result.pixels is not None
        assert np.array_equal(result.pixels, sample_images(network, plan, [spec])[0])
