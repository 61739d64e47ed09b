"""Images in the array of an npz or npy file, read in parts."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from diffusion.config import ImageSize, size_pair
from formats.file_content import describe_wrong_content
from trainer.data.cache import write_in
from trainer.data.dataset import DataError, Float32Array, IntArray, Uint8Array
from trainer.data.fitting import fit_array
from trainer.data.listing import shorten
from trainer.data.options import DataConfig
from trainer.data.stored_array import IN_MEMORY_BYTES, Rows, open_member, open_npy, parts_of
from trainer.data.summary import Summary
from trainer.data.workers import Workers
from trainer.run_folder import warn

MOST_CHANNELS_FIRST = 4
"""A first image axis of at most this length, followed by two longer ones, is interpreted as channels."""
Array = npt.NDArray[Any]


class ArrayDataset:
    """An npz file with `images` (NHWC or NHW), `labels` and optionally `classes` (names), or an npy file of images.

    Images are uint8 in 0..255, or numbers of any type with `data.value_range`; they are then returned as float32.
    """

    def __init__(
        self, path: Path, image_size: ImageSize, channels: int, options: DataConfig, *, labelled: bool, cache: Path
    ) -> None:
        images, others, digest, unpacked = _read(path, {"images", "labels"} if labelled else {"images"}, cache)
        self._rows = images
        self._options = options
        self._image_size = image_size
        count, height, width = _check_shape(path, images, channels)
        self._shape = (height, width, channels)
        values = _examine(path, images, options, digest, cache)
        self.labels: IntArray = np.zeros(count, np.int64)
        self.class_names: tuple[str, ...] = ()
        if labelled:
            self.labels = _check_labels(path, others["labels"], count)
            self.class_names = _class_names(path, others.get("classes"), self.labels)
        self.description: dict[str, str | int] = {"file": path.name, "sha256": digest, "images": count}
        summary = Summary(image_size, options)
        summary.add(width, height, count=count)
        if labelled:
            summary.count_classes(self.class_names, self.labels)
        summary.remarks += _remarks_on_values(images.dtype, values, options)
        if unpacked is not None:
            summary.remarks.append(f"images unpacked into {unpacked}")
        self.summary = summary.line()
        self._workers = Workers(options.workers)

    def images(self, indices: IntArray, draws: npt.NDArray[np.floating] | None = None) -> Uint8Array | Float32Array:
        """Return the images at these indices; crop with `draws` [N, 3] if random crops are enabled."""
        crops = [None] * len(indices) if draws is None or not self._options.random_crop else draws.tolist()
        scaled = self._options.value_range is not None
        size = size_pair(self._image_size)
        pixels = np.empty((len(indices), *size, self._shape[2]), np.float32 if scaled else np.uint8)

        def read_one(position: int) -> None:
            index = int(indices[position])
            image = self._rows.rows(index, index + 1).reshape(self._shape)
            if scaled:
                image = self._scaled(image)
            pixels[position] = fit_array(image, size, self._options.small_images, crops[position])

        self._workers.each(len(indices), read_one)
        return cast("Uint8Array | Float32Array", pixels)

    def _scaled(self, image: Array) -> Float32Array:
        """Return values of value_range as float32 in -1..1."""
        black, white = self._options.value_range or (0, 255)
        values = (image.astype(np.float64) - black) / (white - black) * 2 - 1
        return (values.clip(-1, 1) if self._options.outside_range == "clip" else values).astype(np.float32)


def _read(path: Path, needed: set[str], cache: Path) -> tuple[Rows, dict[str, Array], str, Path | None]:
    """Return the images, the other arrays, the digest of the file, and the file the images were unpacked into."""
    kind = "npy" if path.suffix.lower() == ".npy" else "npz"
    try:
        if problem := describe_wrong_content(path):
            raise DataError(f"{path} {problem}")
        if kind == "npz" and not zipfile.is_zipfile(path):
            raise DataError(f"{path} is damaged, or not an npz file: write one with np.savez")
        digest = _sha256(path, cache)
        if kind == "npy":
            return open_npy(path), {}, digest, None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            others = {name: archive[name] for name in names if name in (needed - {"images"}) | {"classes"}}
            if "images" in names:
                images, unpacked = open_member(path, archive.zip, "images", digest, cache)
    except DataError:
        raise
    except Exception as error:  # errors of the archive, its compression, or an array's header have many types
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "allow_pickle" in reason:
            reason = "it contains arrays of Python objects, which are not read; save numbers, or names as strings"
        if isinstance(error, OSError) and error.filename not in (None, str(path)):
            reason = f"{error.filename}: {reason} (--cache sets the folder for unpacked arrays)"
        raise DataError(f"{path} cannot be read as an {kind} file: {reason or type(error).__name__}") from error
    if missing := needed - set(names):
        without = "; to train without labels, use --set class_conditional=false" if missing == {"labels"} else ""
        raise DataError(
            f"{path} must contain the arrays {' and '.join(map(repr, sorted(needed)))}; missing: {sorted(missing)}; "
            f"it contains: {shorten(names) or 'nothing'}{without}"
        )
    return images, others, digest, unpacked


def _sha256(path: Path, cache: Path) -> str:
    name = _record_name("digest", path)
    if (recalled := _recall(cache, name, path)) is not None:
        return str(recalled["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(cache, name, path, {"sha256": digest})
    return digest


def _check_shape(path: Path, images: Rows, channels: int) -> tuple[int, int, int]:
    """Return number, height and width of the images."""
    if len(images.shape) not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{path}: images must be uint8 [N, H, W, C] or [N, H, W], none of them 0; got {images.dtype} {images.shape}"
        )
    shape = images.shape if len(images.shape) == 4 else (*images.shape, 1)
    if _is_channels_first(shape, channels):
        raise DataError(
            f"{path}: images are {shape}, channels first; they must be [N, H, W, C]: "
            "transpose with images.transpose(0, 2, 3, 1)"
        )
    if images.dtype.kind not in "buif":
        raise DataError(f"{path}: images must be uint8 in 0..255; got {images.dtype}")
    if shape[-1] != channels:
        raise DataError(
            f"{path} has {shape[-1]} channels, model.image_channels is {channels}: "
            f"choose --set model.image_channels={shape[-1]}"
        )
    return shape[0], shape[1], shape[2]


class _Values(NamedTuple):
    """What is known of all values."""

    low: float
    high: float
    outside: int
    """Number of values outside value_range."""


def _examine(path: Path, images: Rows, options: DataConfig, digest: str, cache: Path) -> _Values:
    """Read all values once, and check that they are finite numbers in the range.

    Raises:
        DataError: the array is damaged, or its values cannot be used.
    """
    name = _record_name(f"values-{digest}-{options.value_range}-{options.outside_range}", path)
    if (recalled := _recall(cache, name, path)) is not None:
        return _Values(float(recalled["low"]), float(recalled["high"]), int(recalled["outside"]))
    low, high, start, not_finite = math.inf, -math.inf, 0, []
    outside, outside_images = 0, []
    for part in parts_of(images, "checking values"):
        low, high = float(np.minimum(low, part.min())), float(np.maximum(high, part.max()))
        rows = part.reshape(len(part), -1)
        if not (math.isfinite(low) and math.isfinite(high)):
            not_finite += (start + np.flatnonzero(~np.isfinite(rows).all(axis=1))).tolist()
        elif options.value_range is not None and (low < options.value_range[0] or high > options.value_range[1]):
            off = ((rows < options.value_range[0]) | (rows > options.value_range[1])).sum(axis=1)
            outside += int(off.sum())
            outside_images += (start + np.flatnonzero(off)).tolist()
        start += len(part)
    if options.value_range is None and images.dtype != np.uint8:
        raise DataError(f"{path}: images must be uint8 in 0..255; got {images.dtype}{_cure_of_type(images, low, high)}")
    if not_finite:
        raise DataError(f"{path}: {_images(not_finite)} NaN or infinity; remove them, or replace these values")
    if outside and options.outside_range == "fail":
        assert options.value_range is not None  # noqa: S101  # values are outside only of a range
        black, white = options.value_range
        raise DataError(
            f"{path}: {_images(outside_images)} values outside data.value_range {black:g}..{white:g}: {outside:,} "
            f"values, all values are in {low:g}..{high:g}; widen the range, or clip with --set data.outside_range=clip"
        )
    _remember(cache, name, path, {"low": low, "high": high, "outside": outside})
    return _Values(low, high, outside)


def _images(indices: list[int]) -> str:
    """Return, for example, "2 images (indices 3, 17) contain"."""
    if len(indices) == 1:
        return f"the image at index {indices[0]} contains"
    return f"{len(indices):,} images (indices {shorten(map(str, indices))}) contain"


def _remarks_on_values(dtype: np.dtype[Any], values: _Values, options: DataConfig) -> list[str]:
    if options.value_range is None:
        if values.high > 1:
            return []
        return ["no value is above 1, which is nearly black: --set data.value_range=0,1 makes 1 white"]
    black, white = options.value_range
    clipped = f", {values.outside:,} values outside are clipped (data.outside_range)" if values.outside else ""
    return [
        f"{dtype} values in {values.low:g}..{values.high:g}, of which {black:g}..{white:g} is scaled to -1..1 "
        f"(data.value_range){clipped}"
    ]


def _record_name(what: str, path: Path) -> str:
    status = path.stat()
    parts = (1, what, path.resolve(), status.st_size, status.st_mtime_ns)
    return f"record-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _recall(cache: Path, name: str, path: Path) -> dict[str, Any] | None:
    """Return what was remembered about a large file that has not changed since; None: nothing."""
    if path.stat().st_size <= IN_MEMORY_BYTES:
        return None
    try:
        recalled = json.loads((cache / name).read_bytes())
    except (OSError, ValueError):
        return None
    return recalled if isinstance(recalled, dict) else None


def _remember(cache: Path, name: str, path: Path, record: dict[str, Any]) -> None:
    if path.stat().st_size <= IN_MEMORY_BYTES:
        return
    try:
        write_in(cache, name, lambda temporary: temporary.write_text(json.dumps(record)))
    except OSError as error:
        warn(f"what was found in {path} cannot be kept for the next start, {error.filename}: {error.strerror}")


def _is_channels_first(shape: tuple[int, ...], channels: int) -> bool:
    _, first, second, last = shape
    if last == channels and second != last:
        return False
    return first == channels < last or first <= MOST_CHANNELS_FIRST < min(second, last)


def _cure_of_type(images: Rows, low: float, high: float) -> str:
    """Return an option or a conversion to 0..255, or the range of the values if it is unknown."""
    kind, dtype = images.dtype.kind, images.dtype
    option = "train on the values as they are, --set data.value_range={},{}, or convert with "
    if dtype == np.bool_:
        return f": {option.format(0, 1)}images.astype('uint8') * 255"
    if not (math.isfinite(low) and math.isfinite(high)):
        return " with values that are not finite numbers"
    if kind in "iu" and low >= 0 and high <= 1:
        return f" in 0..1: {option.format(0, 1)}images.astype('uint8') * 255"
    if kind == "f" and low >= 0 and high <= 1:
        return f" in 0..1: {option.format(0, 1)}(images * 255).round().astype('uint8')"
    if kind == "f" and low >= -1 and high <= 1:
        return f" in -1..1: {option.format(-1, 1)}((images + 1) * 127.5).round().astype('uint8')"
    if low >= 0 and high <= 255:
        return f": {option.format(0, 255)}images.astype('uint8')"
    if dtype == np.uint16:
        return (
            f" in {low:g}..{high:g}: if 65535 is white, {option.format(0, 65535)}(images / 257).round().astype('uint8')"
        )
    return (
        f" in {low:g}..{high:g}: {option.format(f'{low:g}', f'{high:g}')}"
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
