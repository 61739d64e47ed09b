"""The torch backend on a CUDA device: graphs equal eager calls, pixels do not depend on company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.backends.base import BackendOptions, Precision
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageResult
from service.engine.runners.array_runner import ArrayRunner
from service.errors import ModelError
from service.metrics import Metrics
from tests.fakes import generation, params, tiny_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = EngineConfig(max_rows=4, slots_per_row=2, plan_lines=64)
PRECISIONS = pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.02)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def backend(folder: Path, precision: Precision = "auto") -> TorchBackend:
    return TorchBackend(folder, BackendOptions(device="cuda", precision=precision, max_rows=CONFIG.max_rows))


@PRECISIONS
def test_every_captured_size_is_near_the_cpu(folder: Path, precision: Precision, tolerance: float) -> None:
    on_gpu, on_cpu = backend(folder, precision), TorchBackend(folder, BackendOptions(device="cpu"))
    assert on_gpu.batch_sizes == (1, 2, 4)
    for size in on_gpu.batch_sizes:
        x_t, t, y = torch.randn(size, 1, 8, 8), torch.linspace(0, 999, size), torch.arange(size) % 5
        expected = on_cpu(x_t, on_cpu.embed_timesteps(t), y)
        out = on_gpu(x_t.cuda(), on_gpu.embed_timesteps(t.cuda()), y.cuda())
        error = (out.cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert out.dtype == torch.float32
        assert float(error) < tolerance


def test_a_replay_gives_the_bits_of_an_eager_call(folder: Path) -> None:
    on_gpu = backend(folder)
    x_t, y = torch.randn(4, 1, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    emb_t = on_gpu.embed_timesteps(torch.linspace(0, 999, 4, device="cuda"))
    with torch.inference_mode():
        eager = on_gpu._forward(x_t, emb_t, y)
    assert torch.equal(on_gpu(x_t, emb_t, y), eager)


@PRECISIONS
def test_pixels_do_not_depend_on_company(folder: Path, precision: Precision, tolerance: float) -> None:
    runner: ArrayRunner[Any] = ArrayRunner(backend(folder, precision), CONFIG)
    runner.warm_up()
    images = [params(steps=4 + k, cfg_scale=1.0 + k % 2, seed=k) for k in range(5)]

    def run(*chosen: int) -> list[ImageResult]:
        engine = Engine({"m": runner}, CONFIG, Metrics())
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


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="must be one of cuda:0"):
        TorchBackend(folder, BackendOptions(device="cuda:99"))
