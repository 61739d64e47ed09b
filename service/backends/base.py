"""What a runner asks of a backend: one network call on a batch of rows, and what the numbers depend on."""

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
from formats.precision import PrecisionChoice
from formats.tensorrt_files import BuildEngines
from service.backends.batch_sizes import doubling_sizes
from service.backends.device_queue import DeviceQueue
from service.backends.pending import Later, Pending

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Threads = Annotated[int, Field(ge=1, le=1024)]
"""The rules of these types hold where they are validated: in `service.settings`."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How networks are run; each backend reads the options that concern it.

    Those that `service.settings.Settings` takes over have their defaults and types here.
    """

    max_rows: int = 8
    """Width of the engine: most rows of a network call."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes to compile, ascending, where a backend compiles; None: those that an artifact was exported for, else
    1, 2, 4, ..., of them what is below the width, and the width."""
    threads: Threads | None = None
    """Threads of a network call; unset: one per core that affinity and cgroup quota allow."""
    device: Device = "auto"
    """Where the torch and TensorRT backends run: auto (a CUDA device if there is one), cpu, cuda or cuda:N."""
    precision: PrecisionChoice = "auto"
    """Of the network: fp32, bf16 or fp16 (CUDA only); auto: bf16 on a CUDA device, and with openvino where the
    processor has it and the artifact was measured in it, else fp32."""
    torch_compile: bool = False
    """Compile the network with torch.compile: minutes at start-up for each batch size."""
    fuse_update: bool = False
    """On a CUDA device, compile noise and update into one kernel (torch.compile: needs Triton and a C compiler)."""
    build_engines: BuildEngines | None = None
    """Builds the engines that the TensorRT backend lacks; None: nobody asked for that, and lacking one is an error."""
    cache_dir: str | None = None
    """Where openvino keeps compiled graphs for the next start; unset: the user's cache folder; empty: nowhere."""

    @property
    def sizes_to_compile(self) -> tuple[int, ...]:
        """The batch sizes that a backend compiles, ascending."""
        return doubling_sizes(self.max_rows) if self.batch_sizes is None else self.batch_sizes


class FailureKind(enum.Enum):
    """What an error raised by a network call means for taking the step again."""

    ROWS = "error"
    """Some row may be the reason; the backend is synchronous, so that a call without that row would not have raised."""
    OUT_OF_MEMORY = "out_of_memory"
    """Nothing was computed; a smaller batch may fit."""
    DEVICE = "device"
    """Nothing on the device can be trusted any more, and the error may be that of an earlier call."""


def synchronous_failure_kind(error: Exception) -> FailureKind:
    """Return the kind of an error of a backend that has no device of its own and returns when it has computed."""
    return FailureKind.OUT_OF_MEMORY if isinstance(error, MemoryError) else FailureKind.ROWS


class RowNetwork(Protocol[A]):
    """What is run on batches of rows, and must give each row the same bits in every batch."""

    @property
    def config(self) -> AnyCheckpointConfig:
        """What it is."""
        ...

    description: str
    """Backend, device and precision, for people."""
    batch_sizes: tuple[int, ...] | None
    """The batch sizes that were compiled, ascending, and the only ones that may be run; None: any size may be."""
    xp: Any
    """The module that makes the arrays it takes (`asarray`, `zeros`, `int64`, ...): `numpy` or `torch`."""
    device: Any
    """Where it takes them; "cpu" for numpy."""

    def embed_timesteps(self, t_model: A) -> A:
        """Return emb_t, float32 [n, emb_channels], for what the network is told of n timesteps, float32 [n]; any n."""
        ...

    def __call__(self, inputs: NetworkInputs[A]) -> A:
        """Run it on a batch of n rows; returns float32 [n, ...].

        What it returns is the caller's: a later call does not change it.
        """
        ...


class GuidingClassifier(RowNetwork[A], Protocol[A]):
    """A noisy classifier's gradient of log p(y | x_t) by x_t, ready to run: called, it returns [n, C, H, W]."""

    config: ClassifierCheckpointConfig


class Denoiser(RowNetwork[A], Protocol[A]):
    """A network, ready to run: returns [n, out_channels, H, W]. Holds weights and nothing about requests."""

    config: CheckpointConfig
    network_id: str
    """Names everything that the outputs of network and classifier depend on besides their inputs: weights, backend,
    precision, versions, machine. Part of a runner's `numerics_id`."""
    threads: int
    """Threads of the processor that a network call takes; 0 where it does not run on the processor."""
    classifier: GuidingClassifier[A] | None
    """Guides the network's images; takes the same arrays, on the same device. None: the model folder has none."""

    @property
    def queue(self) -> DeviceQueue[A] | None:
        """What reaches a device that takes work in order and answers later; None: there is none, `begin` is used."""
        ...

    def begin(self, inputs: NetworkInputs[A]) -> Pending[A]:
        """Begin a call, which goes on by itself where the network can do that; one call at a time.

        Returns:
            What `__call__` returns, when it is waited for.
        """
        ...

    def failure_kind(self, error: Exception) -> FailureKind:
        """Say what an error means that was raised while a step was computed with this network or its classifier."""
        ...


class DenoiserDefaults(ABC, Generic[A]):
    """`queue` and `begin` for a denoiser that has no queue, and whose calls cannot go on by themselves."""

    queue: DeviceQueue[A] | None = None

    @abstractmethod
    def __call__(self, inputs: NetworkInputs[A]) -> A:
        """Run the network, as `Denoiser`."""

    def begin(self, inputs: NetworkInputs[A]) -> Pending[A]:
        """Return a call that is made when it is waited for."""
        return Later(lambda: self(inputs))
