"""The `torch` backend: run a checkpoint's UNet in PyTorch, eager on a CPU, as captured steps on a GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.network_inputs import NetworkInputs
from diffusion.unet import UNet
from formats.checkpoint import load_unet
from formats.checkpoint_config import CheckpointError, checkpoint_sha256
from formats.precision import Precision, PrecisionChoice
from service.backends.base import (
    BackendOptions,
    DenoiserDefaults,
    FailureKind,
    GuidingClassifier,
    synchronous_failure_kind,
)
from service.backends.batch_sizes import close_sizes
from service.backends.compiling import compile_per_shape, repeatable_options
from service.backends.cuda_errors import cuda_failure_kind
from service.backends.cuda_graphs import CallAgain, Capture, CudaCapture, EmbNetwork, GraphedNetwork
from service.backends.cuda_network import CudaUNet, fastest_group_norm, group_norm
from service.backends.cuda_queue import CudaQueue, fastest_normal
from service.backends.processor import instruction_limits, vector_instructions
from service.backends.torch_classifier import load_torch_classifier
from service.cpus import available_cpus
from service.errors import ModelError

NOT_CHOSEN_BY = frozenset({"cpu_name", "num_sockets", "num_physical_cores", "num_logical_cores"})
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Text of an allocation error on the CPU; torch has no exception type for it."""
BFLOAT16_CAPABILITY = (8, 0)
"""Least compute capability with bfloat16 arithmetic."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend(DenoiserDefaults[Tensor]):
    """Implements `Denoiser` on a CPU or a CUDA device."""

    xp: Any = torch

    def __init__(self, folder: Path, options: BackendOptions | None = None) -> None:
        options = options or BackendOptions()
        torch.set_num_threads(options.threads or min(torch.get_num_threads(), available_cpus().usable))
        self.device = choose_device(options.device)
        on_cuda = self.device.type == "cuda"
        sizes = options.sizes_to_compile
        if on_cuda:
            choose_kernels_repeatably()  # before anything is captured
            if options.batch_sizes is None and not options.torch_compile:
                sizes = close_sizes(options.max_rows)
        try:
            self.config, network = load_unet(folder)
            model_hash = checkpoint_sha256(folder)
            classifier = load_torch_classifier(folder, self.config, self.device, sizes)
        except CheckpointError as error:
            raise ModelError(str(error)) from error

        self._dtype = choose_dtype(options.precision, self.device)
        self.threads = 0 if on_cuda else torch.get_num_threads()
        self.precision = next(name for name, dtype in DTYPES.items() if dtype == self._dtype)
        self.description = _describe(self.device, self._dtype, options.torch_compile)
        facts = _gpu(self.device) if on_cuda else _processor()
        if on_cuda:
            normalise = group_norm if options.torch_compile else fastest_group_norm(self.device)
            normal = fastest_normal(self.device)
            facts |= {"norm": normalise.__name__, "noise": normal.__name__}
        depends_on = [model_hash, self.description, json.dumps(facts, sort_keys=True)]
        if classifier is not None:
            depends_on.append(classifier.sha256)
        self.classifier: GuidingClassifier[Tensor] | None = classifier
        self.network_id = hashlib.sha256("\n".join(depends_on).encode()).hexdigest()[:16]

        self._network = network.to(self.device)
        self._forward_emb: Callable[..., Tensor]
        if on_cuda:
            self._forward_emb = CudaUNet(network, self._dtype, normalise, sizes[-1])
        else:
            if self._dtype != torch.float32:
                lower_weights(network, self._dtype)
            self._forward_emb = network.forward_emb
        self.batch_sizes: tuple[int, ...] | None = None
        if options.torch_compile:
            # Each size may be compiled up to 4 times: tensors and callers may or may not be in inference mode
            self._forward_emb = compile_per_shape(self._forward_emb, 4 * len(sizes), repeatable_options())
        self._run: EmbNetwork = self._forward
        if on_cuda:  # the runner captures whole steps; only tests make single calls
            self.batch_sizes = sizes
            gradient = None if classifier is None else classifier.gradient
            self.queue = CudaQueue(self.device, self._forward, gradient, fuses=options.fuse_update, normal=normal)
        elif options.torch_compile:
            self.batch_sizes = sizes
            self._run = self._graphed(CallAgain())

    @torch.inference_mode()
    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        """Run the time MLP, in float32."""
        return self._network.embed_timesteps(t_model)

    @torch.inference_mode()
    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Run the UNet."""
        return self._run(inputs)

    def capture_calls(self) -> None:
        """Run later calls as CUDA graphs of the network alone; for tests and benchmarks, on a CUDA device.

        The service captures entire steps instead.
        """
        self._run = self._graphed(CudaCapture(self.device))

    def failure_kind(self, error: Exception) -> FailureKind:
        """Return the kind; on a CUDA device, errors of the device are of kind DEVICE."""
        if CPU_OUT_OF_MEMORY in str(error):
            return FailureKind.OUT_OF_MEMORY
        return cuda_failure_kind(error) if self.device.type == "cuda" else synchronous_failure_kind(error)

    def _forward(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        if self.device.type == "cuda" or self._dtype == torch.float32:
            return self._forward_emb(*inputs)
        with torch.autocast(self.device.type, self._dtype, cache_enabled=False):
            return self._forward_emb(*inputs)

    def _graphed(self, capture: Capture) -> GraphedNetwork:
        return GraphedNetwork(self._forward, self.batch_sizes or (), self.zero_inputs, capture)

    def zero_inputs(self, size: int) -> NetworkInputs[Tensor]:
        """Return inputs of zeros for a call of `size` rows."""
        model = self.config.model
        x_t = torch.zeros(size, *model.image_shape, device=self.device)
        emb_t = torch.zeros(size, model.emb_channels, device=self.device)
        y = None if model.num_classes is None else torch.zeros(size, dtype=torch.int64, device=self.device)
        cond = None if model.cond_shape is None else torch.zeros(size, *model.cond_shape, device=self.device)
        return NetworkInputs(x_t, emb_t, y, cond)


def choose_device(wanted: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` selects on this machine.

    Raises:
        ModelError: torch does not see the CUDA device.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelError(f"device '{wanted}': torch {torch.__version__} sees no CUDA device; use cpu, or auto")
    count = torch.cuda.device_count()
    index = int(wanted.partition(":")[2] or torch.cuda.current_device())
    if index >= count:
        raise ModelError(f"device '{wanted}': must be one of cuda:0..cuda:{count - 1}")
    return torch.device("cuda", index)


def choose_dtype(precision: PrecisionChoice, device: torch.device) -> torch.dtype:
    """Return the data type of the network; `auto` is float32 on a CPU, and on a CUDA device bfloat16 or float16.

    Devices of compute capability below 8.0 have no bfloat16 arithmetic and get float16.

    Raises:
        ModelError: float16 was requested on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise ModelError("precision 'fp16' needs a CUDA device; on a CPU use fp32 or bf16")
    return DTYPES[precision]


def lower_weights(network: UNet, dtype: torch.dtype) -> None:
    """Convert the weights of convolutions and linear layers to a shorter type, for running under autocast.

    As in OpenAI's released code, normalisations, the class embedding and the time MLP stay in float32; so do the sums
    of the softmax inside the attention kernels.
    """
    time_mlp = set(network.time_embed.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) and module not in time_mlp:
            module.to(dtype)


def choose_kernels_repeatably() -> None:
    """Make cuDNN and cuBLAS select kernels by shape instead of timing, for the whole process.

    Without TF32, sums in low precision, and products that divide a sum over several programs (split-K) if few rows
    would leave the device idle: their rounding depends on the number of rows. Only cuBLASLt can do without split-K;
    with it off, products by cuBLAS raise.
    """
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)


def _describe(device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    where = (
        f"cuda {torch.cuda.get_device_name(device)}"
        if device.type == "cuda"
        else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )
    words = ["torch", torch.__version__, where, str(dtype).removeprefix("torch.")]
    return " ".join([*words, "compiled"] if compiled else words)


def _processor() -> dict[str, object]:
    """Return what kernels are selected by: instruction sets, their limits, cache sizes; not core counts or names."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        return {"instructions": vector_instructions()}
    chosen_by = {name: value for name, value in torch.cpu.get_capabilities().items() if name not in NOT_CHOSEN_BY}
    return chosen_by | instruction_limits()


def _gpu(device: torch.device) -> dict[str, object]:
    """Return what kernel selection depends on: compute capability, multiprocessor count and library versions."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": torch.cuda.get_device_capability(device),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "libraries": {name: _version(name) for name in ("nvidia-cublas", "nvidia-cublas-cu12", "triton")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
