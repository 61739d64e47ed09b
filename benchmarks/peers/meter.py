"""What a server's network did, in a file that another process reads while it runs; and one network call at a time.

The device belongs to all threads and processes of a server together: they take turns by a lock on the file. So a server
that runs several batches at once shares the device among them, as instances on a GPU do, and has no more of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.peers.file_lock import FileLock
from service.backends.artifact_model import FloatArray
from service.backends.base import BackendOptions
from service.backends.openvino_backend import OpenVinoBackend

MAX_ROWS = 64
CALLS, SECONDS = 0, 1
FloatTable = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """Calls and seconds by rows of a call, padding counted; from one moment to another, or since the start."""

    calls: tuple[float, ...]
    seconds: tuple[float, ...]
    """Spent in the network."""
    row_steps: float
    """Rows advanced by a sampling step, padding not counted."""

    @property
    def busy_s(self) -> float:
        """Seconds spent in the network, in all."""
        return sum(self.seconds)

    def since(self, before: Reading) -> Reading:
        """Return what came after an earlier reading."""
        return Reading(
            tuple(now - then for now, then in zip(self.calls, before.calls, strict=True)),
            tuple(now - then for now, then in zip(self.seconds, before.seconds, strict=True)),
            self.row_steps - before.row_steps,
        )


def new_meter(path: Path) -> None:
    """Make a meter's file, or set it to zero."""
    path.write_bytes(np.zeros((MAX_ROWS + 1, 2)).tobytes())


def read_meter(path: Path) -> Reading:
    """Read what has been counted so far; a call that ends meanwhile may be in half of the numbers."""
    table = np.frombuffer(path.read_bytes()).reshape(MAX_ROWS + 1, 2)
    return Reading(tuple(table[1:, CALLS].tolist()), tuple(table[1:, SECONDS].tolist()), float(table[0, 0]))


class Meter:
    """Counts into a file. Every thread of a server needs one of its own, as of a `FileLock`."""

    def __init__(self, path: Path) -> None:
        self._device = FileLock(path)
        self._table: FloatTable = np.memmap(path, np.float64, "r+", shape=(MAX_ROWS + 1, 2))

    @contextmanager
    def call(self, rows: int, row_steps: int) -> Iterator[None]:
        """Wait until nobody else calls the network, then time a call.

        Args:
            rows: of the call, padding counted.
            row_steps: of these, the rows that do not pad.
        """
        with self._device.held():
            begun = time.perf_counter()
            yield
            self._table[rows, SECONDS] += time.perf_counter() - begun
            self._table[rows, CALLS] += 1
            self._table[0, 0] += row_steps


class MeteredBackend(OpenVinoBackend):
    """The service's own OpenVINO backend, with a meter around the network."""

    used_rows = 0
    """Rows of the coming calls that do not pad; 0 where somebody else counts them."""

    def __init__(self, folder: Path, options: BackendOptions, meter: Meter) -> None:
        super().__init__(folder, options)
        self._meter = meter

    def __call__(self, x_t: FloatArray, emb_t: FloatArray, y: Any) -> FloatArray:
        with self._meter.call(len(x_t), self.used_rows):
            return super().__call__(x_t, emb_t, y)
