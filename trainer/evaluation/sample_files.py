"""Generated images of an evaluation: which classes they have, and how their npz file is read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from formats.file_content import describe_wrong_content
from formats.images import Uint8Array
from trainer.evaluation.errors import EvaluationError

IntArray = npt.NDArray[np.int64]


def labels_by_frequency(count: int, data_labels: IntArray, num_classes: int, seed: int = 0) -> IntArray:
    """Return classes in a random order, int64 [count], with the frequencies of a data set, rounded to whole images.

    Args:
        count: number of images.
        data_labels: labels of the data set.
        num_classes: of the model.
        seed: of the order.
    """
    shares = np.bincount(data_labels, minlength=num_classes)[:num_classes] * (count / len(data_labels))
    counts = np.floor(shares).astype(np.int64)
    largest = np.argsort(counts - shares, kind="stable")[: count - counts.sum()]
    counts[largest] += 1
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes, dtype=np.int64), counts))


class StoredImages(NamedTuple):
    """Shape of the images in an npz file."""

    path: Path
    shape: tuple[int, int, int, int]
    """[N, H, W, C]."""

    def batches(self, size: int) -> Iterator[Uint8Array]:
        """Read the images in order, [up to size, H, W, C] at a time."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            count, *shape = self.shape
            for start in range(0, count, size):
                taken = min(size, count - start)
                content = file.read(taken * int(np.prod(shape)))
                yield np.frombuffer(content, np.uint8).reshape(taken, *shape)


def stored_images(path: Path) -> StoredImages | None:
    """Return the images `arr_0`, uint8 NHWC, of an npz file; None if it has no such array.

    Raises:
        EvaluationError: the file cannot be read, or the array is of another type.
    """
    try:
        if problem := describe_wrong_content(path):
            raise EvaluationError(f"{path} {problem}")
        with zipfile.ZipFile(path) as archive:
            if "arr_0.npy" not in archive.namelist():
                return None
            with archive.open("arr_0.npy") as file:
                shape, fortran, dtype = _header(file)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"{path} cannot be read as an npz file: {error}") from error
    if dtype != np.uint8 or fortran or len(shape) != 4:
        raise EvaluationError(f"{path}: arr_0 must be uint8 [N, H, W, C]; got {dtype} {list(shape)}")
    return StoredImages(path, (shape[0], shape[1], shape[2], shape[3]))


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
