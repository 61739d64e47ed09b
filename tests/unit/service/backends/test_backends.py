"""Choice of a backend; devices, precisions and graphs of the torch backend, as far as a CPU can test them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffusion.network_inputs import NetworkInputs
from service.backends.base import BackendOptions, FailureKind
from service.backends.cuda_graphs import CallAgain, GraphedNetwork, Work
from service.backends.select import BACKENDS, Backend, load_denoiser
from service.backends.torch_backend import TorchBackend, choose_device, choose_dtype, lower_weights
from service.engine.config import EngineConfig
from service.engine.runners.array_runner import ArrayRunner
from service.errors import ModelError
from service.settings import Settings
from tests.fakes import tiny_checkpoint, tiny_config, tiny_network

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(rows, 1, 8, 8, generator=generator)
    return x_t, torch.linspace(0, 999, rows), torch.arange(rows) % 5


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_backend_is_chosen_by_name(folder: Path, name: str) -> None:
    assert isinstance(load_denoiser(folder, name, BackendOptions(device="cpu")), TorchBackend)


def test_an_unknown_backend_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="one of auto, openvino, onnxruntime, torch, tensorrt; got 'jax'"):
        load_denoiser(folder, "jax", BackendOptions())


def test_the_error_for_a_missing_package_has_the_command_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Backend(module="service.backends.none", factory="None", requires="no_such_runtime", extra="runtime")
    monkeypatch.setitem(BACKENDS, "absent", absent)
    with pytest.raises(ModelError, match=r"needs no_such_runtime, .* pip install .* -e '\.\[runtime\]'"):
        load_denoiser(folder, "absent", BackendOptions())


def test_an_import_error_inside_a_backend_is_not_reported_as_a_missing_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Backend(module="service.backends.none", factory="None", requires="torch", extra="torch")
    monkeypatch.setitem(BACKENDS, "broken", broken)
    with pytest.raises(ModuleNotFoundError, match=r"service\.backends\.none"):
        load_denoiser(folder, "broken", BackendOptions())


def out_of_memory_on_the_cpu() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    return raised.value


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_torch_backend_distinguishes_errors_of_memory_rows_and_device(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(folder, BackendOptions(device="cpu"))
    monkeypatch.setattr(backend, "device", torch.device(device))
    for error in (MemoryError(), out_of_memory_on_the_cpu()):
        assert backend.failure_kind(error) is FailureKind.OUT_OF_MEMORY
    assert backend.failure_kind(ValueError("x")) is FailureKind.ROWS
    on_device = backend.failure_kind(RuntimeError("CUDA error: device-side assert"))
    assert on_device is (FailureKind.ROWS if device == "cpu" else FailureKind.DEVICE)


def test_settings_reach_the_backend() -> None:
    settings = Settings(
        models=(Path("m"),), max_rows=6, threads=3, device="cuda:1", precision="bf16", torch_compile=True
    )
    assert settings.backend_options() == BackendOptions(
        max_rows=6, threads=3, device="cuda:1", precision="bf16", torch_compile=True
    )


@pytest.mark.parametrize("changes", [{"device": "gpu"}, {"device": "cuda:x"}, {"precision": "int8"}])
def test_settings_that_no_backend_knows_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        Settings.model_validate({"models": ("m",), **changes})


@NO_CUDA
def test_auto_is_float32_on_a_cpu_without_a_cuda_device() -> None:
    device = choose_device("auto")
    assert (device.type, choose_dtype("auto", device)) == ("cpu", torch.float32)
    for wanted in ("cuda", "cuda:0"):
        with pytest.raises(ModelError, match=f"device '{wanted}': torch .* sees no CUDA device"):
            choose_device(wanted)


def test_auto_is_bfloat16_on_a_cuda_device_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_dtype("auto", cuda) == dtype
    assert choose_dtype("fp16", cuda) == torch.float16
    assert choose_dtype("fp32", cuda) == torch.float32


def test_float16_on_a_cpu_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="precision 'fp16' needs a CUDA device"):
        TorchBackend(folder, BackendOptions(device="cpu", precision="fp16"))


def test_bfloat16_is_used_for_convolutions_and_linear_layers_and_stays_close(folder: Path) -> None:
    full = TorchBackend(folder, BackendOptions(device="cpu"))
    low = TorchBackend(folder, BackendOptions(device="cpu", precision="bf16"))
    x_t, t, y = inputs(4)
    emb_t = low.embed_timesteps(t)
    assert torch.equal(emb_t, full.embed_timesteps(t))
    rows = NetworkInputs(x_t, emb_t, y)
    exact, near = full(rows), low(rows)

    error = float((near - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert near.dtype == torch.float32
    assert 1e-4 < error < 0.05
    assert low.network_id != full.network_id
    assert (full.description.split()[-1], low.description.split()[-1]) == ("float32", "bfloat16")
    network = tiny_network(tiny_config())
    lower_weights(network, torch.bfloat16)
    time_mlp = set(network.time_embed.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            assert module.weight.dtype == (torch.float32 if module in time_mlp else torch.bfloat16)
        elif isinstance(module, nn.GroupNorm | nn.Embedding):
            assert module.weight.dtype == torch.float32


def test_eager_torch_on_a_cpu_runs_any_size_and_reports_its_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        backend = TorchBackend(folder, BackendOptions(device="cpu", threads=2))
        assert (backend.batch_sizes, backend.threads, torch.get_num_threads()) == (None, 2, 2)
    finally:
        torch.set_num_threads(before)


def test_a_compiled_network_is_compiled_once_for_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced by torch.compile but run without code generation, which takes minutes. To trace a size twice is an error.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    small = tiny_checkpoint(tmp_path / "small", channel_mult=(1,), attention_resolutions=())
    compiled = TorchBackend(small, BackendOptions(device="cpu", max_rows=2, torch_compile=True))
    eager = TorchBackend(small, BackendOptions(device="cpu"))
    assert compiled.batch_sizes == (1, 2)
    assert compiled.description == f"{eager.description} compiled"
    assert compiled.network_id != eager.network_id

    ArrayRunner(compiled, EngineConfig(max_rows=2)).warm_up()
    for size in compiled.batch_sizes:
        x_t, t, y = inputs(size)
        for emb_t in (eager.embed_timesteps(t), eager.embed_timesteps(t).clone()):  # made in inference mode, and not
            rows = NetworkInputs(x_t, emb_t, y)
            torch.testing.assert_close(compiled(rows), eager(rows), rtol=0, atol=1e-4)


class SameOutput(CallAgain):
    """Writes the output into the same memory each time, as a graph does."""

    def __call__(self, work: Work) -> Work:
        out = work()
        return lambda: out.copy_(work())


class TestGraphedNetwork:
    """Test the buffers, with a capture that calls the work again."""

    captured: list[int]

    def graphed(self) -> GraphedNetwork:
        self.captured = []

        def network(inputs: NetworkInputs[Tensor]) -> Tensor:
            assert inputs.y is not None
            return inputs.x_t + inputs.emb_t[:, :1, None, None] + inputs.y[:, None, None, None]

        def make_inputs(size: int) -> NetworkInputs[Tensor]:
            self.captured.append(size)
            return NetworkInputs(torch.zeros(size, 1, 2, 2), torch.zeros(size, 3), torch.zeros(size, dtype=torch.int64))

        return GraphedNetwork(network, (1, 2, 4), make_inputs, SameOutput())

    def test_each_size_has_its_own_buffers_and_the_largest_is_captured_first(self) -> None:
        graphed = self.graphed()
        assert self.captured == [4, 2, 1]
        for size in (1, 2, 4, 2):
            x_t = torch.full((size, 1, 2, 2), float(size))
            out = graphed(NetworkInputs(x_t, torch.full((size, 3), 10.0), torch.full((size,), 100)))
            np.testing.assert_array_equal(out.numpy(), x_t.numpy() + 110)

    def test_a_later_call_does_not_change_returned_arrays(self) -> None:
        graphed = self.graphed()
        zeros = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
        first = graphed(NetworkInputs(torch.ones(2, 1, 2, 2), *zeros))
        graphed(NetworkInputs(torch.zeros(2, 1, 2, 2), *zeros))
        assert first.eq(1).all()

    def test_a_size_that_was_not_captured_is_refused(self) -> None:
        graphed = self.graphed()
        with pytest.raises(ValueError, match="batch size must be one of 1, 2, 4, as captured; got 3"):
            graphed(NetworkInputs(torch.zeros(3, 1, 2, 2), torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)))


def test_zero_inputs_have_the_shapes_of_the_network(folder: Path) -> None:
    x_t, emb_t, y, cond = TorchBackend(folder, BackendOptions(device="cpu")).zero_inputs(3)
    assert cond is None
    assert (x_t.shape, emb_t.shape) == ((3, 1, 8, 8), (3, tiny_config().model.emb_channels))
    assert y is not None
    assert (y.shape, y.dtype) == ((3,), torch.int64)
