"""TensorRT on a CUDA device: engines built for it, run, compared with PyTorch. Never run so far (docs/tensorrt.md)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.network_inputs import NetworkInputs
from diffusion.time_mlp import WEIGHTS, TimeMLP
from formats.artifact import MANIFEST_FILE, MODEL_FILE, TIME_MLP_FILE, file_entry, manifest_json
from formats.precision import Precision
from formats.tensorrt_files import Target
from formats.tensorrt_package import EngineError, installed_flavour
from model_export.onnx_export import PRECISIONS, export_unet
from model_export.tensorrt_build import build_missing
from service.backends.base import BackendOptions
from service.backends.tensorrt_backend import TensorRTBackend
from service.engine.config import EngineConfig
from service.errors import ModelError
from tests.fakes import tiny_config, tiny_network
from tests.gpu.mixed_batches import assert_pixels_do_not_depend_on_other_images
from tests.tensorrt_fakes import write_artifact


def here() -> str | None:
    """Return why these tests cannot run here."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        flavour = installed_flavour()
    except EngineError as error:
        return str(error)
    trt: Any = importlib.import_module(flavour)
    major, minor = torch.cuda.get_device_capability()
    if flavour == "tensorrt_rtx" and f"SM{major}{minor}" not in trt.ComputeCapability.__members__:
        return f"tensorrt_rtx does not build for sm{major}{minor}"
    return None


REASON = here()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

CONFIG = EngineConfig(max_rows=4, slots_per_row=2)
BANDS = 5
PRECISION_LIMITS: list[tuple[Precision, float]] = [("fp32", 1e-4), ("fp16", 1e-2), ("bf16", 5e-2)]


def build(artifact: Path, store: Path, target: Target, buckets: tuple[int, ...]) -> None:
    build_missing(artifact, target, buckets, store=store)


def tiny_artifact(folder: Path, precision: Precision) -> Path:
    """Export the tiny network as an artifact."""
    config = tiny_config()
    network = tiny_network(config)
    manifest = write_artifact(folder, config, precision=precision)
    export_unet(network, folder / MODEL_FILE, PRECISIONS[precision])
    TimeMLP({name: network.state_dict()[name].numpy() for name in WEIGHTS}).write(folder / TIME_MLP_FILE)
    files = {name: file_entry(folder / name) for name in (MODEL_FILE, TIME_MLP_FILE)}
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest.replace(files=files)))
    return folder


@pytest.fixture(scope="module", params=PRECISION_LIMITS, ids=lambda param: param[0])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TensorRTBackend, float]:
    precision, limit = request.param
    folder = tiny_artifact(tmp_path_factory.mktemp("models") / "tiny", precision)
    with pytest.raises(ModelError, match="has no engine for batches of 1"):
        TensorRTBackend(folder, BackendOptions(max_rows=CONFIG.max_rows))
    built = TensorRTBackend(folder, BackendOptions(max_rows=CONFIG.max_rows, build_engines=build))
    loaded = TensorRTBackend(folder, BackendOptions(max_rows=CONFIG.max_rows))
    assert loaded.network_id == built.network_id
    return loaded, limit


def test_every_bucket_is_close_to_pytorch_in_every_band_of_timesteps(served: tuple[TensorRTBackend, float]) -> None:
    backend, limit = served
    network = tiny_network(tiny_config())
    assert backend.batch_sizes == (1, 2, 4)
    for size in backend.batch_sizes:
        for band in range(BANDS):
            x_t, y = torch.randn(size, 1, 8, 8), torch.arange(size) % 5
            t = torch.linspace(0, 199, size) + 200 * band
            expected = network(x_t, t, y)
            out = backend(NetworkInputs(x_t.cuda(), backend.embed_timesteps(t.cuda()), y.cuda())).cpu()
            assert float((out - expected).norm() / expected.norm()) < limit


def test_an_output_outlives_the_next_call(served: tuple[TensorRTBackend, float]) -> None:
    backend, _ = served
    emb_t, y = backend.embed_timesteps(torch.zeros(2, device="cuda")), torch.zeros(2, dtype=torch.int64, device="cuda")
    first = backend(NetworkInputs(torch.zeros(2, 1, 8, 8, device="cuda"), emb_t, y))
    kept = first.clone()
    backend(NetworkInputs(torch.ones(2, 1, 8, 8, device="cuda"), emb_t, y))
    assert torch.equal(first, kept)


def test_pixels_do_not_depend_on_other_images(served: tuple[TensorRTBackend, float]) -> None:
    assert_pixels_do_not_depend_on_other_images(served[0], CONFIG)
