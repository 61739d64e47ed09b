"""Images in the arrays of an npz file, loaded into memory."""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.file_content import describe_wrong_content
from trainer.data.dataset import DataError, IntArray, Uint8Array
from trainer.data.fitting import fit_array
from trainer.data.listing import shorten
from trainer.data.options import DataConfig
from trainer.data.summary import Summary

MOST_CHANNELS_FIRST = 4
"""A first image axis of at most this length, followed by two longer ones, is interpreted as channels."""
Array = npt.NDArray[Any]


class NpzDataset:
    """An npz file with `images` (uint8 NHWC or NHW), `labels` and optionally `classes` (names)."""

    def __init__(self, path: Path, image_size: int, channels: int, options: DataConfig, *, labelled: bool) -> None:
        arrays = _read(path, {"images", "labels"} if labelled else {"images"})
        self._images = _check_images(path, arrays["images"], channels)
        self._image_size = image_size
        self._options = options
        self.labels: IntArray = np.zeros(len(self._images), np.int64)
        self.class_names: tuple[str, ...] = ()
        if labelled:
            self.labels = _check_labels(path, arrays["labels"], len(self._images))
            self.class_names = _class_names(path, arrays.get("classes"), self.labels)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.description: dict[str, str | int] = {"file": path.name, "sha256": digest, "images": len(self._images)}
        summary = Summary(image_size, options)
        height, width = self._images.shape[1:3]
        summary.add(width, height, count=len(self._images))
        if labelled:
            summary.count_classes(self.class_names, self.labels)
        self.summary = summary.line()

    def images(self, indices: IntArray, draws: npt.NDArray[np.floating] | None = None) -> Uint8Array:
        """Return the images at these indices; crop with `draws` [N, 3] if random crops are enabled."""
        crops = [None] * len(indices) if draws is None or not self._options.random_crop else draws.tolist()
        return np.stack(
            [
                fit_array(self._images[index], self._image_size, self._options.small_images, crop)
                for index, crop in zip(indices, crops, strict=True)
            ]
        )


def _read(path: Path, needed: set[str]) -> dict[str, Array]:
    try:
        if problem := describe_wrong_content(path):
            raise DataError(f"{path} {problem}")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is damaged, or not an npz file: write one with np.savez")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            arrays = {name: archive[name] for name in names if name in needed | {"classes"}}
    except DataError:
        raise
    except Exception as error:  # errors of the archive, its compression, or an array's header have many types
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "allow_pickle" in reason:
            reason = "it contains arrays of Python objects, which are not read; save numbers, or names as strings"
        raise DataError(f"{path} cannot be read as an npz file: {reason or type(error).__name__}") from error
    if missing := needed - arrays.keys():
        without = "; to train without labels, use --set class_conditional=false" if missing == {"labels"} else ""
        raise DataError(
            f"{path} must contain the arrays {' and '.join(map(repr, sorted(needed)))}; missing: {sorted(missing)}; "
            f"it contains: {shorten(names) or 'nothing'}{without}"
        )
    return arrays


def _check_images(path: Path, images: Array, channels: int) -> Uint8Array:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{path}: images must be uint8 [N, H, W, C] or [N, H, W], none of them 0; got {images.dtype} {images.shape}"
        )
    if images.ndim == 3:
        images = images[..., None]
    if _is_channels_first(images.shape, channels):
        raise DataError(
            f"{path}: images are {images.shape}, channels first; they must be [N, H, W, C]: "
            "transpose with images.transpose(0, 2, 3, 1)"
        )
    if images.dtype != np.uint8:
        raise DataError(f"{path}: images must be uint8 in 0..255; got {images.dtype}{_cure_of_type(images)}")
    if images.shape[-1] != channels:
        raise DataError(
            f"{path} has {images.shape[-1]} channels, model.image_channels is {channels}: "
            f"choose --set model.image_channels={images.shape[-1]}"
        )
    return images


def _is_channels_first(shape: tuple[int, ...], channels: int) -> bool:
    _, first, second, last = shape
    if last == channels and second != last:
        return False
    return first == channels < last or first <= MOST_CHANNELS_FIRST < min(second, last)


def _cure_of_type(images: Array) -> str:
    """Return a conversion to 0..255, or the range of the values if it is unknown."""
    if images.dtype == np.bool_:
        return ": convert with images.astype('uint8') * 255"
    if images.dtype.kind not in "iuf":
        return ""
    low, high = images.min(), images.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return " with values that are not finite numbers"
    if images.dtype.kind in "iu" and low >= 0 and high <= 1:
        return " in 0..1: convert with images.astype('uint8') * 255"
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        return " in 0..1: convert with (images * 255).round().astype('uint8')"
    if images.dtype.kind == "f" and low >= -1 and high <= 1:
        return " in -1..1: convert with ((images + 1) * 127.5).round().astype('uint8')"
    if low >= 0 and high <= 255:
        return ": convert with images.astype('uint8')"
    if images.dtype == np.uint16:
        return f" in {low}..{high}: if 65535 is white, convert with (images / 257).round().astype('uint8')"
    return (
        f" in {low}..{high}: scale to 0..255, for example with "
        "((images - images.min()) / (images.max() - images.min()) * 255).round().astype('uint8')"
    )


def _check_labels(path: Path, labels: Array, count: int) -> IntArray:
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        cure = _cure_of_labels(labels, count)
        raise DataError(f"{path}: labels must be {count} integers; got {labels.dtype} {labels.shape}{cure}")
    return labels.astype(np.int64)


def _cure_of_labels(labels: Array, count: int) -> str:
    """Return a conversion of the labels to integers, if one is known."""
    kind = labels.dtype.kind
    if labels.ndim == 2 and len(labels) == count and kind in "iufb":
        hot = (labels == 1).sum(axis=1)
        if (hot == 1).all() and ((labels == 0).sum(axis=1) == labels.shape[1] - 1).all():
            return ", one-hot: convert with labels.argmax(axis=1)"
    if labels.shape != (count,):
        return ""
    if kind == "b" or (kind == "f" and (labels == np.floor(labels)).all() and np.isfinite(labels).all()):
        return ": convert with labels.astype('int64')"
    if kind in "US":
        return ": create both arrays with classes, labels = np.unique(labels, return_inverse=True)"
    return " that are not whole numbers" if kind == "f" else ""


def _class_names(path: Path, names: Array | None, labels: IntArray) -> tuple[str, ...]:
    """Return a name for each class; given names may include classes without images, labels without names may not."""
    low, high = int(labels.min()), int(labels.max())
    if names is None:
        used = np.unique(labels)
        if low != 0 or high != len(used) - 1:
            raise DataError(
                f"{path}: labels must count from 0 without gaps; got {len(used)} different ones in {low}..{high}: "
                "create both arrays with classes, labels = np.unique(labels, return_inverse=True); if some classes "
                "have no image, add an array 'classes' with the names of all"
            )
        return tuple(map(str, range(high + 1)))
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise DataError(f"{path}: classes must be a list of names; got {names.dtype} {names.shape}")
    try:
        decoded = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: classes must be names in UTF-8: {error}") from error
    if repeated := [name for name, count in Counter(decoded).items() if count > 1]:
        raise DataError(f"{path}: classes must be different names; repeated: {shorten(map(repr, repeated))}")
    if low < 0 or high >= len(decoded):
        raise DataError(
            f"{path}: labels must lie in 0..{len(decoded) - 1}, as there are {len(decoded)} classes; got {low}..{high}"
            + (": subtract 1 from each" if (low, high) == (1, len(decoded)) else "")
        )
    return decoded
