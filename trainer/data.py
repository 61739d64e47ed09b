"""Labelled images from an npz file or from a folder of class subfolders, in an order that is a function of a seed."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
LOADER_THREADS = 8

Uint8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


class Dataset(Protocol):
    """Labelled images, addressed by index."""

    labels: IntArray
    """int64 [N]."""
    class_names: tuple[str, ...]
    description: dict[str, str | int]
    """What goes into a checkpoint's provenance; no paths beyond the name."""

    def images(self, indices: IntArray) -> Uint8Array:
        """Return the images [len(indices), size, size, channels]."""
        ...


class DataError(ValueError):
    """Data that cannot be trained on; the message says which file and what is wrong with it."""


class NpzDataset:
    """An npz file with `images` (uint8 NHWC), `labels` and optionally `classes` (names), held in memory."""

    def __init__(self, path: Path, image_size: int, channels: int) -> None:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                missing = {"images", "labels"} - set(arrays.files)
                if missing:
                    raise DataError(f"{path} must hold the arrays 'images' and 'labels'; missing: {sorted(missing)}")
                images, labels = arrays["images"], arrays["labels"]
                names = arrays["classes"] if "classes" in arrays.files else None
        except DataError:
            raise
        except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} cannot be read as an npz file: {error}") from error
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
            raise DataError(f"{path}: images must be uint8 [N, H, W, C], N > 0; got {images.dtype} {images.shape}")
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{path}: labels must be {len(images)} integers; got {labels.dtype} {labels.shape}")
        _check_channels(str(path), images.shape[-1], channels)
        num_classes = int(labels.max()) + 1 if names is None else len(names)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(f"{path}: labels must lie in 0..{num_classes - 1}; got {labels.min()}..{labels.max()}")
        self._images: Uint8Array = _fit_all(images, image_size)
        self.labels: IntArray = labels.astype(np.int64)
        self.class_names = tuple(str(n) for n in (range(num_classes) if names is None else names))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.description: dict[str, str | int] = {"file": path.name, "sha256": digest, "images": len(images)}

    def images(self, indices: IntArray) -> Uint8Array:
        """Return the images at these indices."""
        return self._images[indices]


class FolderDataset:
    """A folder with one subfolder per class; images are decoded, scaled and cropped when they are asked for."""

    def __init__(self, path: Path, image_size: int, channels: int) -> None:
        if channels not in (1, 3):
            raise DataError(f"image files can be read as 1 (grey) or 3 (RGB) channels; the model has {channels}")
        self.class_names = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = sorted(p for p in (path / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(f"{path / name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            files += found
            labels += [label] * len(found)
        if not files:
            raise DataError(f"{path} must hold one subfolder of images per class; it has no subfolder")
        self._files = files
        self._image_size = image_size
        self._mode = "L" if channels == 1 else "RGB"
        self._threads = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="decode")
        self.labels: IntArray = np.array(labels, dtype=np.int64)
        listing = "\n".join(str(p.relative_to(path)) for p in files)
        digest = hashlib.sha256(listing.encode()).hexdigest()
        self.description: dict[str, str | int] = {"folder": path.name, "listing_sha256": digest, "images": len(files)}

    def images(self, indices: IntArray) -> Uint8Array:
        """Decode the images at these indices."""
        return np.stack(list(self._threads.map(self._decode, indices.tolist())))

    def _decode(self, index: int) -> Uint8Array:
        path = self._files[index]
        try:
            with Image.open(path) as image:
                return _fit(image.convert(self._mode), self._image_size)
        except OSError as error:
            raise DataError(f"{path} cannot be decoded: {error}") from error


def open_dataset(path: Path, image_size: int, channels: int) -> Dataset:
    """Open an npz file or a folder of class subfolders.

    Images smaller than image_size are padded with black, others are halved while twice too large, scaled
    (bicubic) so that the shorter side fits, and cropped at the centre.

    Raises:
        DataError: nothing there, or nothing that can be trained on.
    """
    if path.is_dir():
        return FolderDataset(path, image_size, channels)
    if path.is_file():
        return NpzDataset(path, image_size, channels)
    raise DataError(f"data must be an npz file or a folder of class subfolders; there is nothing at {path}")


def batch_indices(seed: int, images_seen: int, batch_size: int, num_images: int) -> IntArray:
    """Return which images the next batch holds: epochs are permutations, each a function of (seed, epoch).

    Args:
        seed: of the run.
        images_seen: images already trained on; the batch holds positions images_seen.. of the endless sequence.
        batch_size: length of the result.
        num_images: N.
    """
    positions = np.arange(images_seen, images_seen + batch_size)
    epochs = positions // num_images
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch_order(seed, int(epoch), num_images)[positions[here] % num_images]
    return indices


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_images: int) -> IntArray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num_images)


def _check_channels(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise DataError(
            f"{what} has {found} channels, model.image_channels is {wanted}: choose --set model.image_channels={found}"
        )


def _fit_all(images: Uint8Array, size: int) -> Uint8Array:
    height, width = images.shape[1:3]
    if height <= size and width <= size:
        return _pad(images, size)
    return np.stack(
        [_fit(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size) for image in images]
    )


def _pad(images: Uint8Array, size: int) -> Uint8Array:
    height, width = images.shape[1:3]
    top, left = (size - height) // 2, (size - width) // 2
    margins: Sequence[tuple[int, int]] = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
    return np.pad(images, margins)


def _fit(image: Image.Image, size: int) -> Uint8Array:
    if image.width <= size and image.height <= size:
        return _pad(_as_array(image)[None], size)[0]
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return _as_array(image.crop((left, top, left + size, top + size)))


def _as_array(image: Image.Image) -> Uint8Array:
    array = np.asarray(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array
