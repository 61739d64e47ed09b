"""Records: a file of float32 rows of one length, appended in order; a killed writer leaves whole rows or half a one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Records:
    """Rows of `width` numbers in a file without a header."""

    def __init__(self, path: Path, width: int) -> None:
        self._path = path
        self._width = width

    def __len__(self) -> int:
        """Return the number of whole rows."""
        return self._path.stat().st_size // self._row_bytes if self._path.exists() else 0

    def truncate(self, rows: int) -> None:
        """Remove all but the first `rows` rows."""
        if self._path.exists():
            os.truncate(self._path, rows * self._row_bytes)

    def append(self, rows: FloatArray) -> None:
        """Append rows [n, width] and wait until they are on the disk.

        Raises:
            OSError: the disk is full.
        """
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(rows, np.float32).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def read(self, rows: int) -> FloatArray:
        """Return the first `rows` rows, float32 [rows, width]."""
        return np.fromfile(self._path, np.float32, rows * self._width).reshape(rows, self._width)

    @property
    def _row_bytes(self) -> int:
        return 4 * self._width
