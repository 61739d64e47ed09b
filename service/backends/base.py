"""The interface between a runner and a backend: options, network calls on batches of rows, and kinds of failure.

`Denoiser` and `GuidingClassifier` are the protocols that every backend implements.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Protocol

from pydantic import Field

from diffusion.arrays import A
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.network_inputs import NetworkInputs
from formats.checkpoint_config import AnyCheckpointConfig
from formats.precision import Precision, PrecisionChoice
from formats.tensorrt_files import BuildEngines
from service.backends.batch_sizes import doubling_sizes
from service.backends.device_queue import DeviceQueue
from service.backends.pending import Later, Pending

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Threads = Annotated[int, Field(ge=1, le=1024)]
"""The constraints of these types are checked only by `service.settings`; this module does not validate them."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Options for running networks; each backend reads those that concern it.

    The defaults and types of the options that are also fields of `service.settings.Settings` are defined here.
    """

    max_rows: int = 8
    """Width of the engine: the maximum number of rows of a network call."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes that a compiling backend compiles, ascending. None: the width, and below it the sizes that the
    artifact was exported for (without an artifact: 1, 2, 4, ...; captured on CUDA: 1, 2, 4, 8, 16, 24, ...)."""
    threads: Threads | None = None
    """Number of threads of a network call; unset: one per core that CPU affinity and cgroup quota allow."""
    device: Device = "auto"
    """Device of the torch and TensorRT backends: auto (a CUDA device if there is one), cpu, cuda or cuda:N."""
    precision: PrecisionChoice = "auto"
    """Precision of the network: fp32, bf16 or fp16 (CUDA only). auto: bf16 on a CUDA device, and with openvino if the
    processor supports bf16 and the artifact was measured in it; otherwise fp32."""
    torch_compile: bool = False
    """Compile the network with torch.compile; this takes minutes at start-up for each batch size."""
    fuse_update: bool = True
    """On a CUDA device, fuse noise and update with torch.compile if that works (it needs Triton and a C compiler, and
    seconds at start-up for each batch size) and gives equal results. Off: noise is one Triton kernel, the update
    PyTorch's operations."""
    build_engines: BuildEngines | None = None
    """Builds missing engines for the TensorRT backend; None: do not build, a missing engine is an error."""
    engines_dir: str | None = None
    """Folder where TensorRT engines are kept, by graph; unset or empty: the folder `tensorrt` of each artifact."""
    cache_dir: str | None = None
    """Folder where openvino caches compiled graphs for the next start; unset: the user's cache folder; empty: none."""

    @property
    def sizes_to_compile(self) -> tuple[int, ...]:
        """The batch sizes that a backend compiles, ascending."""
        return doubling_sizes(self.max_rows) if self.batch_sizes is None else self.batch_sizes


class FailureKind(enum.Enum):
    """Kind of an error raised by a network call; it decides how the step may be retried."""

    ROWS = "error"
    """One row may be the cause. The backend is synchronous, so a call without that row would have succeeded."""
    OUT_OF_MEMORY = "out_of_memory"
    """The call ran out of memory and computed nothing; a smaller batch may fit."""
    DEVICE = "device"
    """The state of the device is no longer reliable; the error may belong to an earlier call."""


def synchronous_failure_kind(error: Exception) -> FailureKind:
    """Return the kind of an error raised by a synchronous backend without a separate device."""
    return FailureKind.OUT_OF_MEMORY if isinstance(error, MemoryError) else FailureKind.ROWS


class RowNetwork(Protocol[A]):
    """A network that runs on batches of rows; the result of a row must be bit-identical in every batch."""

    @property
    def config(self) -> AnyCheckpointConfig:
        """The configuration of the checkpoint."""
        ...

    description: str
    """Human-readable backend, device and precision."""
    batch_sizes: tuple[int, ...] | None
    """The compiled batch sizes, ascending; no other size may be run. None: any size may be run."""
    xp: Any
    """The module that creates its input arrays (`asarray`, `zeros`, `int64`, ...): `numpy` or `torch`."""
    device: Any
    """The device of its input arrays; "cpu" for numpy."""

    def embed_timesteps(self, t_model: A) -> A:
        """Return emb_t, float32 [n, emb_channels], for any number n of the network's own timesteps, float32 [n]."""
        ...

    def __call__(self, inputs: NetworkInputs[A]) -> A:
        """Run the network on a batch of n rows and return float32 [n, ...].

        The caller owns the result: later calls do not overwrite it.
        """
        ...


class GuidingClassifier(RowNetwork[A], Protocol[A]):
    """The gradient of a noisy classifier's log p(y | x_t) with respect to x_t; a call returns [n, C, H, W]."""

    config: ClassifierCheckpointConfig


class Denoiser(RowNetwork[A], Protocol[A]):
    """A loaded denoising network; a call returns [n, out_channels, H, W]. It holds weights, but no request state."""

    config: CheckpointConfig
    network_id: str
    """Identifies everything besides the inputs that determines the outputs of network and classifier: weights, backend,
    precision, versions, machine. Part of a runner's `numerics_id`."""
    precision: Precision
    """Precision in which the network computes."""
    threads: int
    """Number of CPU threads that a network call uses; 0 if it does not run on the CPU."""
    classifier: GuidingClassifier[A] | None
    """Classifier that guides the network; takes the same arrays on the same device. None: there is none."""

    @property
    def queue(self) -> DeviceQueue[A] | None:
        """The queue of an asynchronous device. None: the backend has no such device, and callers use `begin`."""
        ...

    def begin(self, inputs: NetworkInputs[A]) -> Pending[A]:
        """Start a call, in the background if the backend supports that. Only one call may be in progress at a time.

        Returns:
            The pending call; its `wait` returns the result of `__call__`.
        """
        ...

    def failure_kind(self, error: Exception) -> FailureKind:
        """Return the kind of an error raised while a step was computed with this network or its classifier."""
        ...


class DenoiserDefaults(ABC, Generic[A]):
    """Default `queue` and `begin` of a denoiser without a device queue and without background calls."""

    queue: DeviceQueue[A] | None = None

    @abstractmethod
    def __call__(self, inputs: NetworkInputs[A]) -> A:
        """Run the network, as `Denoiser`."""

    def begin(self, inputs: NetworkInputs[A]) -> Pending[A]:
        """Return a deferred call, which runs when `wait` is called."""
        return Later(lambda: self(inputs))
