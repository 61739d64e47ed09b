"""The torch backend on a CUDA device: graphs equal eager calls, and pixels do not depend on other images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.network_inputs import NetworkInputs
from formats.precision import PrecisionChoice
from service.backends.base import BackendOptions
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.runners.array_runner import ArrayRunner
from service.errors import ModelError
from service.metrics import Metrics
from tests.fakes import generation, params, tiny_checkpoint
from tests.gpu.mixed_batches import assert_pixels_do_not_depend_on_other_images

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
CONFIG = EngineConfig(max_rows=4, slots_per_row=2)
PRECISIONS = pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.02)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def backend(folder: Path, precision: PrecisionChoice = "auto") -> TorchBackend:
    loaded = TorchBackend(folder, BackendOptions(device="cuda", precision=precision, max_rows=CONFIG.max_rows))
    loaded.capture_calls()
    return loaded


@PRECISIONS
def test_every_captured_size_is_close_to_the_cpu(folder: Path, precision: PrecisionChoice, tolerance: float) -> None:
    on_gpu, on_cpu = backend(folder, precision), TorchBackend(folder, BackendOptions(device="cpu"))
    assert on_gpu.batch_sizes == (1, 2, 4)
    for size in on_gpu.batch_sizes:
        x_t, t, y = torch.randn(size, 1, 8, 8), torch.linspace(0, 999, size), torch.arange(size) % 5
        expected = on_cpu(NetworkInputs(x_t, on_cpu.embed_timesteps(t), y))
        out = on_gpu(NetworkInputs(x_t.cuda(), on_gpu.embed_timesteps(t.cuda()), y.cuda()))
        error = (out.cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert out.dtype == torch.float32
        assert float(error) < tolerance


def test_a_replay_is_bit_identical_to_an_eager_call(folder: Path) -> None:
    on_gpu = backend(folder)
    x_t, y = torch.randn(4, 1, 8, 8, device="cuda"), torch.arange(4, device="cuda")
    emb_t = on_gpu.embed_timesteps(torch.linspace(0, 999, 4, device="cuda"))
    with torch.inference_mode():
        eager = on_gpu._forward(NetworkInputs(x_t, emb_t, y))
    assert torch.equal(on_gpu(NetworkInputs(x_t, emb_t, y)), eager)


@PRECISIONS
def test_pixels_do_not_depend_on_other_images(folder: Path, precision: PrecisionChoice, tolerance: float) -> None:
    assert_pixels_do_not_depend_on_other_images(backend(folder, precision), CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 32, "image_channels": 3, "channel_mult": (1, 2, 2), "attention_resolutions": (16, 8)},
        {
            "image_size": (16, 24),
            "image_channels": 4,
            "attention_resolutions": (8,),
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        {"image_size": 64, "image_channels": 3, "model_channels": 64, "attention_resolutions": (32,)},
    ],
    ids=["rgb", "not square", "64x64"],
)
def test_pixels_of_networks_of_many_shapes_do_not_depend_on_other_images(
    changes: dict[str, object], tmp_path: Path
) -> None:
    wide = EngineConfig(max_rows=24, slots_per_row=1)
    made = TorchBackend(tiny_checkpoint(tmp_path / "tiny", **changes), BackendOptions(device=DEVICE, max_rows=24))
    assert_pixels_do_not_depend_on_other_images(made, wide)


def test_models_on_one_device_do_not_change_each_others_pixels(folder: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", image_size=16, image_channels=3, attention_resolutions=(8,))
    options = BackendOptions(device=DEVICE, max_rows=CONFIG.max_rows)
    runners = {name: ArrayRunner(TorchBackend(path, options), CONFIG) for name, path in (("a", folder), ("b", other))}
    for runner in runners.values():
        runner.warm_up()

    def run(*names: str) -> dict[str, bytes]:
        engine = Engine(dict(runners), CONFIG, Metrics())
        for name in names:
            image = params(steps=6, seed=3)
            engine.add(replace(generation(name, image, image), model=name), submitted_at=0.0)
        found: dict[str, bytes] = {}
        while engine.has_work():
            for result in engine.step():
                assert result.pixels is not None
                found[f"{result.request_id} {result.position}"] = result.pixels.tobytes()
        return found

    assert run("a", "b") == run("a") | run("b")


def test_a_missing_device_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="must be one of cuda:0"):
        TorchBackend(folder, BackendOptions(device="cuda:99"))
