"""Count the network calls of a server in a file that another process reads, and allow one network call at a time.

All threads and processes of a server share the device and take turns with a lock on the file. A server
that runs several batches at once divides the device between them, as instances on a GPU do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.peers.file_lock import FileLock
from benchmarks.peers.simulated_device import SimulatedDevice
from diffusion.network_inputs import NetworkInputs
from service.backends.artifact_model import FloatArray
from service.backends.base import BackendOptions, Denoiser, DenoiserDefaults, FailureKind
from service.backends.openvino_backend import OpenVinoBackend
from service.backends.pending import Pending

MAX_ROWS = 64
CALLS, SECONDS = 0, 1
FloatTable = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """Calls and seconds by rows of a call, padding counted; between two readings, or since the start."""

    calls: tuple[float, ...]
    seconds: tuple[float, ...]
    """Seconds in the network."""
    row_steps: float
    """Rows advanced by a sampling step, padding not counted."""

    @property
    def busy_s(self) -> float:
        """Total seconds in the network."""
        return sum(self.seconds)

    def since(self, before: Reading) -> Reading:
        """Return the difference from an earlier reading."""
        return Reading(
            tuple(now - then for now, then in zip(self.calls, before.calls, strict=True)),
            tuple(now - then for now, then in zip(self.seconds, before.seconds, strict=True)),
            self.row_steps - before.row_steps,
        )


def new_meter(path: Path) -> None:
    """Create a meter's file, or reset it to zero."""
    path.write_bytes(np.zeros((MAX_ROWS + 1, 2)).tobytes())


def read_meter(path: Path) -> Reading:
    """Read the counters; a call that ends at the same time may be included in only some of them."""
    table = np.frombuffer(path.read_bytes()).reshape(MAX_ROWS + 1, 2)
    return Reading(tuple(table[1:, CALLS].tolist()), tuple(table[1:, SECONDS].tolist()), float(table[0, 0]))


class Meter:
    """Writes counters to a file. Every thread of a server needs its own instance, as of a `FileLock`."""

    def __init__(self, path: Path) -> None:
        self._device = FileLock(path)
        mapped = np.memmap(path, np.float64, "r+", shape=(MAX_ROWS + 1, 2))
        self._table: FloatTable = np.asarray(mapped)  # the same memory, with faster access

    @contextmanager
    def call(self, rows: int, row_steps: int) -> Iterator[None]:
        """Wait for exclusive use of the network, then time a call.

        Args:
            rows: rows of the call, including padding.
            row_steps: rows without padding.
        """
        with self._device.held():
            begun = time.perf_counter()
            yield
            self._count(rows, row_steps, time.perf_counter() - begun)

    def begin(self, rows: int, row_steps: int, begin: Callable[[], TimedCall]) -> MeteredCall:
        """Wait for exclusive use of the network, then start a call that reports its own duration."""
        self._device.acquire()
        try:
            return MeteredCall(self, begin(), rows, row_steps)
        except BaseException:
            self._device.release()
            raise

    def end(self, rows: int, row_steps: int, seconds: float | None) -> None:
        """Count a started call, unless it raised, and release the network."""
        if seconds is not None:
            self._count(rows, row_steps, seconds)
        self._device.release()

    def _count(self, rows: int, row_steps: int, seconds: float) -> None:
        self._table[rows, SECONDS] += seconds
        self._table[rows, CALLS] += 1
        self._table[0, 0] += row_steps


class TimedCall(Pending[FloatArray], Protocol):
    """A network call in progress."""

    @property
    def seconds(self) -> float:
        """Duration of the call, independent of when the caller waits for it."""
        ...


class TimedNetwork(Denoiser[Any], Protocol):
    """A network whose calls report their duration."""

    def begin(self, inputs: NetworkInputs[Any]) -> TimedCall:
        """Start a call."""
        ...


class MeteredCall:
    """A network call in progress with exclusive use of the device."""

    def __init__(self, meter: Meter, call: TimedCall, rows: int, row_steps: int) -> None:
        self._meter = meter
        self._call = call
        self._rows = rows
        self._row_steps = row_steps

    def wait(self) -> FloatArray:
        """Wait for the call, count it, and release the device."""
        seconds = None
        try:
            out = self._call.wait()
            seconds = self._call.seconds
        finally:
            self._meter.end(self._rows, self._row_steps, seconds)
        return out


class MeteredNetwork(DenoiserDefaults[Any]):
    """A network with a meter around its calls, for one thread."""

    xp: Any = np
    device: Any = "cpu"
    used_rows = 0
    """Rows of the next calls without padding; 0 if they are counted elsewhere."""

    def __init__(self, network: TimedNetwork, meter: Meter) -> None:
        self.config = network.config
        self.network_id = network.network_id
        self.precision = network.precision
        self.description = network.description
        self.batch_sizes = network.batch_sizes
        self.threads = network.threads
        self.classifier = network.classifier
        self._network = network
        self._meter = meter

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Delegate to the network."""
        return self._network.embed_timesteps(t_model)

    def failure_kind(self, error: Exception) -> FailureKind:
        """Delegate to the network."""
        return self._network.failure_kind(error)

    def __call__(self, inputs: NetworkInputs[Any]) -> FloatArray:
        """Call the network when it is available."""
        return self.begin(inputs).wait()

    def begin(self, inputs: NetworkInputs[Any]) -> Pending[FloatArray]:
        """Start a call when the network is available."""
        return self._meter.begin(len(inputs.x_t), self.used_rows, lambda: self._network.begin(inputs))


def metered_network(
    folder: Path, options: BackendOptions, meter: Path, device_ms: tuple[float, float] | None
) -> MeteredNetwork:
    """Open the network that all servers use, with its own meter.

    Args:
        folder: model folder.
        options: options of the service's OpenVINO backend.
        meter: file of the meter.
        device_ms: fixed time and time per row of a call on a simulated device; None: the network is run.
    """
    network: TimedNetwork
    network = OpenVinoBackend(folder, options) if device_ms is None else SimulatedDevice(folder, options, *device_ms)
    return MeteredNetwork(network, Meter(meter))
