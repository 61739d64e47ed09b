"""The contenders: every backend of the service, run by the service's own classes, and the peers.

A contender is written KIND:PRECISION. KIND is a backend of the service (`openvino`, `onnxruntime`, `torch`, ...),
`torch-compile` (the torch backend with torch.compile), or a peer: `eager` (the same UNet, called from PyTorch without
CUDA graphs; on a CPU this is what the torch backend does), `eager-compile`, and `diffusers` (UNet2DModel with the same
weights, in PyTorch).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.networks import BenchNetwork
from diffusion.arrays import to_numpy
from diffusion.config import CheckpointConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_X_T, normal
from diffusion.respacing import respace
from formats.checkpoint import load_unet
from formats.extras import install_command
from formats.precision import Precision
from interchange.diffusers_config import DoesNotMap
from service.backends.base import BackendOptions, Denoiser
from service.backends.select import BACKENDS, load_denoiser
from service.backends.torch_backend import TorchBackend, choose_dtype, lower_weights
from service.errors import ModelError

COMPILED = "torch-compile"
PEERS = ("eager", "eager-compile", "diffusers")
SPREAD = 2654435761
"""Knuth's multiplicative hash: rows get timesteps from the entire chain, at every batch size."""

CPU_CONTENDERS = (
    *("torch:fp32", "torch:bf16", "onnxruntime:fp32", "openvino:fp32", "openvino:bf16"),
    *("diffusers:fp32", "diffusers:bf16"),
)
CUDA_CONTENDERS = tuple(
    f"{kind}:{precision}"
    for precision in ("bf16", "fp16")
    for kind in ("eager", "torch", "eager-compile", COMPILED, "diffusers")
)

Call = Callable[[], Any]
"""One network call on prepared inputs; returns the output when it is complete."""


class Absent(ValueError):
    """A contender is not available for this network or machine; the message gives the reason."""


@dataclass(frozen=True)
class Entry:
    """A contender's parsed name."""

    kind: str
    precision: Precision

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read KIND:PRECISION.

        Raises:
            ValueError: wrong format, or unknown kind or precision.
        """
        kind, colon, precision = text.partition(":")
        kinds = (*BACKENDS, COMPILED, *PEERS)
        precisions: dict[str, Precision] = {name: name for name in get_args(Precision)}
        if not colon or kind not in kinds or precision not in precisions:
            raise ValueError(
                f"a contender is KIND:PRECISION, KIND one of {', '.join(kinds)}, "
                f"PRECISION one of {', '.join(precisions)}; got {text!r}"
            )
        return cls(kind, precisions[precision])

    def __str__(self) -> str:
        return f"{self.kind}:{self.precision}"


@dataclass(frozen=True)
class Rows:
    """The inputs of one network call. Row k is the same in every batch."""

    x_t: npt.NDArray[np.float32]
    t: npt.NDArray[np.float32]
    """Timesteps passed to the network, [n]."""
    y: npt.NDArray[np.int64] | None

    @classmethod
    def make(cls, config: CheckpointConfig, count: int) -> Self:
        """Return rows of noise with varied timesteps and classes."""
        model, ids = config.model, np.arange(count)
        t_model = respace(config.diffusion).t_model
        x_t = normal(ids, ids * 0, ids * 0, STREAM_X_T, model.image_shape)
        y = None if model.num_classes is None else ids % model.num_labels
        return cls(x_t, t_model[ids * SPREAD % len(t_model)].astype(np.float32), y)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Device and threads of all contenders."""

    device: torch.device
    threads: int

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def open_contender(entry: Entry, network: BenchNetwork, rows: Rows, place: Place) -> Call:
    """Load a contender, compiled for one batch size, with its inputs on its device.

    Raises:
        Absent: it is not available here.
    """
    try:
        if entry.kind == "diffusers":
            return _diffusers_call(entry, network, rows, place)
        if entry.kind.startswith("eager"):
            return _eager_call(entry, network, rows, place)
        count = len(rows.x_t)
        denoiser = open_denoiser(entry, network, place, BackendOptions(max_rows=count, batch_sizes=(count,)))
        if isinstance(denoiser, TorchBackend) and place.device.type == "cuda":
            denoiser.capture_calls()
        return denoiser_call(denoiser, rows, place)
    except torch.OutOfMemoryError as error:
        raise Absent("out of the device's memory") from error


def open_denoiser(entry: Entry, network: BenchNetwork, place: Place, options: BackendOptions) -> Denoiser[Any]:
    """Load a backend of the service as the service does, except for the cache of compiled graphs.

    Args:
        entry: a backend's name, or `COMPILED`.
        network: the network to load.
        place: device and threads.
        options: width and sizes to compile; other fields are set here.

    Raises:
        Absent: it cannot run this network here.
    """
    backend = "torch" if entry.kind == COMPILED else entry.kind
    folder = network.checkpoint if backend == "torch" else network.artifact()
    settled = BackendOptions(
        max_rows=options.max_rows,
        batch_sizes=options.batch_sizes,
        threads=place.threads,
        device=str(place.device),
        precision=entry.precision,
        torch_compile=entry.kind == COMPILED,
        cache_dir="",
    )
    try:
        return load_denoiser(folder, backend, settled)
    except ModelError as error:
        raise Absent(str(error)) from error


def denoiser_call(denoiser: Denoiser[Any], rows: Rows, place: Place) -> Call:
    """Bind a denoiser to its inputs, with emb_t precomputed, as in the service's table of plans."""

    def put(array: npt.NDArray[Any]) -> Any:
        return denoiser.xp.asarray(array, device=denoiser.device)

    x_t, emb_t = put(rows.x_t), denoiser.embed_timesteps(put(rows.t))
    inputs: NetworkInputs[Any] = NetworkInputs(x_t, emb_t, None if rows.y is None else put(rows.y))

    def call() -> Any:
        out = denoiser(inputs)
        place.wait()
        return out

    return call


def relative_error(out: Any, reference: npt.NDArray[np.float32]) -> float:
    """Return the norm of an output's difference from the reference, over the reference's norm."""
    difference = to_numpy(out).astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def reference_output(network: BenchNetwork, rows: Rows) -> npt.NDArray[np.float32]:
    """Run the plain network in float32 on the CPU, a row at a time."""
    _, unet = load_unet(network.checkpoint)
    x_t, t = torch.from_numpy(rows.x_t), torch.from_numpy(rows.t)
    y = None if rows.y is None else torch.from_numpy(rows.y)
    with torch.inference_mode():
        parts = [unet(x_t[[k]], t[[k]], None if y is None else y[[k]]) for k in range(len(x_t))]
    return to_numpy(torch.cat(parts))


class EagerUNet:
    """The plain UNet in PyTorch, in a precision: no graphs, any batch. Run like a `UNet`.

    Raises:
        Absent: the device does not support the precision.
    """

    def __init__(self, entry: Entry, network: BenchNetwork, place: Place) -> None:
        try:
            self._dtype = choose_dtype(entry.precision, place.device)
        except ModelError as error:
            raise Absent(str(error)) from error
        self._device = place.device
        _, unet = load_unet(network.checkpoint)
        unet = unet.to(place.device)
        if place.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        if self._dtype != torch.float32:
            lower_weights(unet, self._dtype)
        self.config = unet.config
        self._unet = unet
        self._forward_emb: Callable[..., Tensor] = unet.forward_emb
        if entry.kind == "eager-compile":
            self._forward_emb = torch.compile(unet.forward_emb, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def embed_timesteps(self, t: Tensor) -> Tensor:
        """Run the time MLP, in float32."""
        return self._unet.embed_timesteps(t)

    @torch.inference_mode()
    def run(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Run the network on embedded timesteps."""
        if self._device.type == "cuda":
            inputs = inputs._replace(x_t=inputs.x_t.contiguous(memory_format=torch.channels_last))
        low = self._dtype != torch.float32
        with torch.autocast(self._device.type, self._dtype, cache_enabled=False) if low else nullcontext():
            return self._forward_emb(*inputs)


def load_diffusers(entry: Entry, network: BenchNetwork, place: Place) -> Any:
    """Load the network as a UNet2DModel.

    Raises:
        Absent: diffusers is not installed, or cannot represent this network.
    """
    try:
        from diffusers import UNet2DModel
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed: {install_command('bench')}") from error
    try:
        dtype = choose_dtype(entry.precision, place.device)
        folder = network.diffusers_folder()
    except (ModelError, DoesNotMap) as error:
        raise Absent(" ".join(str(error).split())) from error
    unet: Any = UNet2DModel.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
    unet = unet.eval().requires_grad_(False).to(place.device)
    if place.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    return unet


def _eager_call(entry: Entry, network: BenchNetwork, rows: Rows, place: Place) -> Call:
    unet = EagerUNet(entry, network, place)
    x_t, t, y = _tensors(rows, place.device)
    inputs: NetworkInputs[Tensor] = NetworkInputs(x_t, unet.embed_timesteps(t), y)

    def call() -> Any:
        out = unet.run(inputs)
        place.wait()
        return out

    return call


def _diffusers_call(entry: Entry, network: BenchNetwork, rows: Rows, place: Place) -> Call:
    unet = load_diffusers(entry, network, place)
    x_t, t, y = _tensors(rows, place.device)
    x_t = x_t.to(unet.dtype)

    @torch.inference_mode()
    def call() -> Any:
        out = unet(x_t, t, class_labels=y).sample.float()
        place.wait()
        return out

    return call


def _tensors(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    y = None if rows.y is None else torch.from_numpy(rows.y).to(device)
    return torch.from_numpy(rows.x_t).to(device), torch.from_numpy(rows.t).to(device), y
