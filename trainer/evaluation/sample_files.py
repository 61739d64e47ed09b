"""Generated images on disk: shards while they are generated, then one npz file for guided-diffusion's evaluator.

plan.json               what is generated; a run can only be resumed with an equal plan
shards/N.npz            images of shard N, written atomically; removed when the npz file is complete
samples.npz             arr_0: uint8 [N, H, W, C], arr_1: int64 [N] (models with classes)
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from formats.atomic_file import replace_file, write_file
from formats.file_content import describe_wrong_content
from formats.images import Uint8Array
from formats.json_files import read_object
from formats.leftovers import remove_leftovers
from trainer.evaluation.errors import EvaluationError

IntArray = npt.NDArray[np.int64]

PLAN_FILE = "plan.json"
SAMPLES_FILE = "samples.npz"
SHARDS_FOLDER = "shards"


def balanced_labels(count: int, num_classes: int) -> IntArray:
    """Return the class of each image, int64 [count]: k mod num_classes, so that frequencies differ by at most one."""
    return np.arange(count, dtype=np.int64) % num_classes


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


class SampleFolder:
    """The folder of one generation; `plan` is written with the first shard and compared when it is resumed."""

    def __init__(self, folder: Path, plan: dict[str, Any], count: int, shard_size: int) -> None:
        """Open a new or an earlier folder.

        Raises:
            EvaluationError: the folder holds images of another plan.
        """
        self.folder, self.count, self.shard_size = folder, count, shard_size
        if folder.exists() and not folder.is_dir():
            raise EvaluationError(f"--out must be a folder; {folder} is a file")
        path = folder / PLAN_FILE
        plan = json.loads(json.dumps({**plan, "images": count, "shard_size": shard_size}))
        if path.exists():
            earlier = _read_plan(path)
            if changed := [name for name in {**earlier, **plan} if earlier.get(name) != plan.get(name)]:
                values = "; ".join(f"{name} was {earlier.get(name)}, is {plan.get(name)}" for name in changed)
                raise EvaluationError(
                    f"{folder} holds images that were generated differently ({values}): use another --out, or remove it"
                )
        else:
            if (folder / SAMPLES_FILE).exists() or (folder / SHARDS_FOLDER).exists():
                raise EvaluationError(f"{folder} holds images without {PLAN_FILE}: use another --out")
            (folder / SHARDS_FOLDER).mkdir(parents=True, exist_ok=True)
            write_file(path, f"{json.dumps(plan, indent=2)}\n".encode())

    @property
    def samples(self) -> Path:
        """The npz file of all images."""
        return self.folder / SAMPLES_FILE

    def missing(self) -> list[range]:
        """Return the images that are yet to be generated, one range per shard."""
        if self.samples.exists():
            return []
        return [images for images in self._shards() if not self._shard(images.start).exists()]

    def write_shard(self, images: range, pixels: Uint8Array) -> None:
        """Write the images of a shard, [len(images), H, W, C]."""
        path = self._shard(images.start)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: _save_npz(temporary, pixels))

    def finish(self, labels: IntArray | None) -> Path:
        """Join the shards into the npz file, and remove them."""
        if not self.samples.exists():
            replace_file(self.samples, lambda temporary: self._join(temporary, labels))
        remove_leftovers(self.samples)
        shutil.rmtree(self.folder / SHARDS_FOLDER, ignore_errors=True)
        return self.samples

    def _join(self, path: Path, labels: IntArray | None) -> None:
        shards = self._shards()
        shape = _load(self._shard(0)).shape[1:]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for images in shards:
                    file.write(np.ascontiguousarray(_load(self._shard(images.start))).data)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, labels)

    def _shards(self) -> list[range]:
        starts = range(0, self.count, self.shard_size)
        return [range(start, min(start + self.shard_size, self.count)) for start in starts]

    def _shard(self, first: int) -> Path:
        return self.folder / SHARDS_FOLDER / f"{first // self.shard_size:06d}.npz"


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(str(error)) from error


def _save_npz(path: Path, pixels: Uint8Array) -> None:
    with path.open("wb") as file:
        np.savez(file, arr_0=pixels)


def _load(path: Path) -> Uint8Array:
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive["arr_0"])


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
