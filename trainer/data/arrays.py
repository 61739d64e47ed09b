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

from diffusion.config import ImageSize, ranges_of, size_pair
from formats.file_content import describe_wrong_content
from trainer.data.cache import write_in
from trainer.data.dataset import Conditions, DataError, Float32Array, IntArray, Uint8Array
from trainer.data.fitting import fit_array
from trainer.data.listing import shorten
from trainer.data.options import ConditionConfig, DataConfig
from trainer.data.part import Part
from trainer.data.stored_array import IN_MEMORY_BYTES, Rows, open_member, open_npy, parts_of
from trainer.data.summary import Summary
from trainer.data.workers import Workers
from trainer.run_folder import warn

MOST_CHANNELS_FIRST = 4
"""A first image axis of at most this length, followed by two longer ones, is interpreted as channels."""
CONDITIONS = ConditionConfig.array
Array = npt.NDArray[Any]


class ArrayDataset:
    """An npz file with `images` (NHWC or NHW), `labels` and optionally `classes` (names), or an npy file of images.

    Images are uint8 in 0..255, or numbers of any type with `data.value_range`; they are then returned as float32.
    Conditioning images are read from the array `cond` (`ConditionConfig`).
    """

    conditions: Conditions | None = None

    def __init__(
        self,
        path: Path,
        image_size: ImageSize,
        channels: int,
        options: DataConfig,
        *,
        labelled: bool,
        cache: Path,
        paired: bool = False,
    ) -> None:
        needed = {options.array, "labels"} if labelled else {options.array}
        content = _read(path, options.array, needed, cache)
        images, others, digest = content.images, content.others, content.sha256
        self._rows = images
        self._options = options
        self._image_size = image_size
        count, height, width = _check_shape(path, images, channels, options)
        self._shape = (height, width, channels)
        self.sizes: IntArray = np.broadcast_to(np.array([height, width], np.int64), (count, 2))
        if options.value_range is not None:
            low, high = np.array(ranges_of(options.value_range, channels)).T
            self._low, self._span = low, high - low
        values = _examine(path, images, channels, options, digest, cache)
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
        if content.unpacked is not None:
            summary.remarks.append(f"{options.array} unpacked into {content.unpacked}")
        if CONDITIONS in content.names and options.array != CONDITIONS and not paired:
            summary.remarks.append(f"its array {CONDITIONS!r} is not used (model.cond_channels)")
        self.summary = summary.line()
        self._workers = Workers(options.workers)

    def name_of(self, index: int) -> str:
        """Return how an image is called in messages."""
        return f"index {index}"

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

    def part(self, indices: IntArray) -> Part:
        """Return some of the images as a data set."""
        return Part(self, indices, lambda chosen, draws: self.images(indices[chosen], draws))

    def _scaled(self, image: Array) -> Float32Array:
        """Return values of value_range as float32 in -1..1."""
        values = (image.astype(np.float64) - self._low) / self._span * 2 - 1
        return (values.clip(-1, 1) if self._options.outside_range == "clip" else values).astype(np.float32)


class _Content(NamedTuple):
    """What was read of a file."""

    images: Rows
    others: dict[str, Array]
    sha256: str
    unpacked: Path | None
    """The file into which the images were unpacked; None: they were not."""
    names: list[str]
    """Names of all arrays of an npz file."""


def _read(path: Path, array: str, needed: set[str], cache: Path) -> _Content:
    """Read the images, which an npz file has in `array`, and the other arrays that are needed."""
    kind = "npy" if path.suffix.lower() == ".npy" else "npz"
    try:
        if problem := describe_wrong_content(path):
            raise DataError(f"{path} {problem}")
        if kind == "npz" and not zipfile.is_zipfile(path):
            raise DataError(f"{path} is damaged, or not an npz file: write one with np.savez")
        digest = _sha256(path, cache)
        if kind == "npy":
            return _Content(open_npy(path), {}, digest, None, [])
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            others = {name: archive[name] for name in names if name in (needed - {array}) | {"classes"}}
            if array in names:
                images, unpacked = open_member(path, archive.zip, array, digest, cache)
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
        without = ""
        if missing == {"labels"}:
            without = "; to train without labels, use --set class_conditional=false"
        elif missing == {CONDITIONS}:
            without = "; conditioning images may also be a file of their own: --cond FILE"
        raise DataError(
            f"{path} must contain the arrays {' and '.join(map(repr, sorted(needed)))}; missing: {sorted(missing)}; "
            f"it contains: {shorten(names) or 'nothing'}{without}"
        )
    return _Content(images, others, digest, unpacked, names)


def _sha256(path: Path, cache: Path) -> str:
    name = _record_name("digest", path)
    if (recalled := _recall(cache, name, path)) is not None:
        return str(recalled["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(cache, name, path, {"sha256": digest})
    return digest


def _check_shape(path: Path, images: Rows, channels: int, options: DataConfig) -> tuple[int, int, int]:
    """Return number, height and width of the images."""
    name, field = options.array, options.channels_field
    if len(images.shape) not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{path}: {name} must be uint8 [N, H, W, C] or [N, H, W], none of them 0; got {images.dtype} {images.shape}"
        )
    shape = images.shape if len(images.shape) == 4 else (*images.shape, 1)
    if _is_channels_first(shape, channels):
        raise DataError(
            f"{path}: {name} are {shape}, channels first; they must be [N, H, W, C]: "
            f"transpose with {name}.transpose(0, 2, 3, 1)"
        )
    if images.dtype.kind not in "buif":
        raise DataError(f"{path}: {name} must be uint8 in 0..255; got {images.dtype}")
    if shape[-1] != channels:
        raise DataError(
            f"{path}: the array {name!r} has {shape[-1]} channels, {field} is {channels}: "
            f"choose --set {field}={shape[-1]}"
        )
    return shape[0], shape[1], shape[2]


class _Values(NamedTuple):
    """What is known of all values."""

    low: float
    high: float
    outside: int
    """Number of values outside value_range."""


def _examine(path: Path, images: Rows, channels: int, options: DataConfig, digest: str, cache: Path) -> _Values:
    """Read all values once, and check that they are finite numbers in the range.

    Raises:
        DataError: the array is damaged, or its values cannot be used.
    """
    name = _record_name(f"values-{digest}-{options.array}-{options.value_range}-{options.outside_range}", path)
    if (recalled := _recall(cache, name, path)) is not None:
        return _Values(float(recalled["low"]), float(recalled["high"]), int(recalled["outside"]))
    low, high, start, not_finite = math.inf, -math.inf, 0, []
    outside, outside_images = 0, []
    ranges = None if options.value_range is None else np.array(ranges_of(options.value_range, channels)).T
    for part in parts_of(images, "checking values"):
        low, high = float(np.minimum(low, part.min())), float(np.maximum(high, part.max()))
        rows = part.reshape(len(part), -1)
        if not (math.isfinite(low) and math.isfinite(high)):
            not_finite += (start + np.flatnonzero(~np.isfinite(rows).all(axis=1))).tolist()
        elif ranges is not None and (low < ranges[0].max() or high > ranges[1].min()):
            pixels = part.reshape(len(part), -1, channels)
            off = ((pixels < ranges[0]) | (pixels > ranges[1])).sum(axis=(1, 2))
            outside += int(off.sum())
            outside_images += (start + np.flatnonzero(off)).tolist()
        start += len(part)
    if options.value_range is None and images.dtype != np.uint8:
        cure = _cure_of_type(images, low, high, options)
        raise DataError(f"{path}: {options.array} must be uint8 in 0..255; got {images.dtype}{cure}")
    if not_finite:
        raise DataError(f"{path}: {_images(not_finite)} NaN or infinity; remove them, or replace these values")
    if outside and options.outside_range == "fail":
        raise DataError(
            f"{path}: {_images(outside_images)} values outside {options.range_field} {options.range_text}: {outside:,} "
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
        return [f"no value is above 1, which is nearly black: --set {options.range_field}=0,1 makes 1 white"]
    clipped = f", {values.outside:,} values outside are clipped (data.outside_range)" if values.outside else ""
    return [
        f"{dtype} values in {values.low:g}..{values.high:g}, of which {options.range_text} is scaled to -1..1 "
        f"({options.range_field}){clipped}"
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


def _cure_of_type(images: Rows, low: float, high: float, options: DataConfig) -> str:
    """Return an option or a conversion to 0..255, or the range of the values if it is unknown."""
    kind, dtype, array = images.dtype.kind, images.dtype, options.array
    option = f"train on the values as they are, --set {options.range_field}={{}},{{}}, or convert with "
    if dtype == np.bool_:
        return f": {option.format(0, 1)}{array}.astype('uint8') * 255"
    if not (math.isfinite(low) and math.isfinite(high)):
        return " with values that are not finite numbers"
    if kind in "iu" and low >= 0 and high <= 1:
        return f" in 0..1: {option.format(0, 1)}{array}.astype('uint8') * 255"
    if kind == "f" and low >= 0 and high <= 1:
        return f" in 0..1: {option.format(0, 1)}({array} * 255).round().astype('uint8')"
    if kind == "f" and low >= -1 and high <= 1:
        return f" in -1..1: {option.format(-1, 1)}(({array} + 1) * 127.5).round().astype('uint8')"
    if low >= 0 and high <= 255:
        return f": {option.format(0, 255)}{array}.astype('uint8')"
    if dtype == np.uint16:
        return (
            f" in {low:g}..{high:g}: if 65535 is white, "
            f"{option.format(0, 65535)}({array} / 257).round().astype('uint8')"
        )
    return (
        f" in {low:g}..{high:g}: {option.format(f'{low:g}', f'{high:g}')}"
        f"(({array} - {array}.min()) / ({array}.max() - {array}.min()) * 255).round().astype('uint8')"
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
