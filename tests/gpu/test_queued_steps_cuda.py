"""Whole steps as graphs on a CUDA device, with the host ahead. Never run so far (docs/decisions/0013)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.backends.base import BackendOptions, FailureKind
from service.backends.cuda_queue import CudaQueue
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageParams, ImageResult, ImageStatus, Watch
from service.engine.runners.array_runner import ArrayRunner
from service.engine.runners.step import add_noise_and_advance
from service.metrics import Metrics
from tests.fakes import generation, params, tiny_checkpoint, tiny_guided_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = EngineConfig(max_rows=4, slots_per_row=1, strict_graphs=True, timed_calls=0)


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "fused"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ArrayRunner[Tensor]:
    folder = tiny_guided_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    options = BackendOptions(device="cuda", max_rows=CONFIG.max_rows, fuse_update=request.param)
    made = ArrayRunner(TorchBackend(folder, options), CONFIG)
    made.warm_up()
    return made


def finish(engine: Engine) -> list[ImageResult]:
    results: list[ImageResult] = []
    while engine.has_work():
        results += engine.step()
    return results


def alone(runner: ArrayRunner[Tensor], image: ImageParams) -> bytes:
    engine = Engine({"m": runner}, CONFIG, Metrics())
    engine.add(generation("alone", image), submitted_at=0.0)
    (result,) = finish(engine)
    assert result.pixels is not None
    return result.pixels.tobytes()


def test_pixels_do_not_depend_on_other_images_eviction_or_watchers(runner: ArrayRunner[Tensor]) -> None:
    metrics = Metrics()
    engine = Engine({"m": runner}, CONFIG, metrics)
    images = [
        replace(params(steps=3 + 2 * k, seed=k, cfg_scale=1.0 + k % 2, classifier_scale=2.0 * (k % 3)), class_index=1)
        for k in range(7)
    ]
    engine.add(generation("first", *images[4:], watch=Watch(preview_every=2)), submitted_at=0.0)
    results = engine.step() + engine.step()
    engine.add(generation("second", *images[:4]), submitted_at=0.0)
    results += finish(engine)
    assert len(results) == len(images)
    for result in results:
        image = images[result.position + (4 if result.request_id == "first" else 0)]
        assert result.pixels is not None
        assert result.pixels.tobytes() == alone(runner, image)
    assert metrics.registry.get_sample_value("iddpm_uncaptured_steps_total", {"model": "m"}) == 0


def test_a_row_that_is_not_finite_fails_alone(runner: ArrayRunner[Tensor]) -> None:
    good, bad = params(steps=4, seed=1), params(steps=4, seed=2)
    engine = Engine({"m": runner}, CONFIG, Metrics())
    engine.add(generation("r", good, bad), submitted_at=0.0)
    engine.launch()
    runner.slots.x[CONFIG.num_slots - 2] = torch.nan
    by_position = {result.position: result for result in finish(engine)}
    assert by_position[1].status is ImageStatus.FAILED
    pixels = by_position[0].pixels
    assert pixels is not None
    assert pixels.tobytes() == alone(runner, good)


def test_the_fused_kernel_is_close_to_separate_operations() -> None:
    queue = CudaQueue(torch.device("cuda"), lambda inputs: inputs.x_t, None, fuses=True)
    draw = torch.Generator().manual_seed(0)
    x_t, x0_prev, out, var_values = (torch.randn(4, 3, 8, 8, generator=draw).cuda() for _ in range(4))
    lines, rows = torch.rand(4, 12, generator=draw).cuda(), torch.arange(4, device="cuda")
    arguments = (lines, x_t, x0_prev, out, var_values, (rows, rows, rows), None)
    fuse = queue.fuse(add_noise_and_advance)
    assert fuse is not None
    plain, fused = add_noise_and_advance(*arguments), fuse(*arguments)
    torch.testing.assert_close(fused.x_prev, plain.x_prev, rtol=1e-5, atol=1e-5)

    out[1, 0, 0, 0], var_values[2, 0, 0, 0] = torch.inf, -torch.inf
    for advance in (add_noise_and_advance, fuse):
        assert advance(*arguments).ok.tolist() == [True, False, False, True]


def test_copies_have_the_values_at_the_time_of_their_request() -> None:
    queue = CudaQueue(torch.device("cuda"), lambda inputs: inputs.x_t, None, fuses=False)
    values = np.arange(1000)
    sent = queue.send(values)
    values[:] = -1
    copy = queue.fetch(sent)
    sent.zero_()
    np.testing.assert_array_equal(copy.wait(), np.arange(1000))


def test_a_device_error_is_distinguished_from_lack_of_memory(tmp_path: Path) -> None:
    backend = TorchBackend(tiny_checkpoint(tmp_path / "tiny"), BackendOptions(device="cuda", max_rows=4))
    assert backend.failure_kind(torch.OutOfMemoryError("x")) is FailureKind.OUT_OF_MEMORY
    assert (
        backend.failure_kind(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
        is FailureKind.DEVICE
    )
