"""Images of a Hugging Face data set that was saved with `save_to_disk`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.config import ImageSize
from formats.extras import install_command
from trainer.data.checking import ExaminedSources, check_sources
from trainer.data.dataset import DataError, IntArray
from trainer.data.decoder import Decoder
from trainer.data.encoded_images import EncodedImages
from trainer.data.image_file import Encoded, Source, mode_of
from trainer.data.listing import shorten, sorted_class_names
from trainer.data.options import DataConfig
from trainer.data.summary import Summary


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


class Rows:
    """The rows of a saved data set: an encoded image of one column and a label each."""

    def __init__(self, path: Path, options: DataConfig, *, labelled: bool) -> None:
        """Open the data set, and find its columns.

        Raises:
            DataError: it cannot be read or has no row, or a column is missing or ambiguous; the columns are named.
        """
        dataset = _load(path)
        image_column = _image_column(path, dataset, options)
        self.path = path
        self._images = dataset.data.column(image_column)
        if len(self) == 0:
            raise DataError(f"{path} contains no image")
        self.labelled = labelled
        self.labels: IntArray = np.zeros(len(self), np.int64)
        self.class_names: tuple[str, ...] = ()
        columns = f"column {image_column!r}"
        if labelled:
            label_column = _label_column(path, dataset, options.label_column)
            self.labels, self.class_names = _labels(path, dataset, label_column)
            columns = f"columns {image_column!r} and {label_column!r}"
        self.remark = f"{columns} of a Hugging Face data set"

    def __len__(self) -> int:
        return len(self._images)

    def source(self, row: int) -> Source:
        """Return the encoded image of a row, or the path of its file."""
        image = self._images[row].as_py() or {}
        path, content = image.get("path"), image.get("bytes")
        if content is None and path:
            return Path(path)
        return Encoded(f"{self.path}, row {row}" + (f" ({path})" if path else ""), content or b"")


class HuggingFaceDataset(EncodedImages):
    """A data set with a column of images and one of labels."""

    def __init__(
        self,
        rows: Rows,
        examined: ExaminedSources,
        kept: IntArray,
        image_size: ImageSize,
        channels: int,
        options: DataConfig,
    ) -> None:
        """Describe the images.

        Args:
            rows: of the saved data set.
            examined: what was found about their images.
            kept: numbers of the rows that are used, ascending.
            image_size: size of the images that the data set returns.
            channels: 1 for grey, 3 for RGB.
            options: how images are read.
        """
        summary = Summary(image_size, options)
        checked = check_sources(examined, kept, options, summary)
        self._kept, self.sizes = checked.kept, checked.sizes
        self.labels = rows.labels[kept]
        self.class_names = rows.class_names
        if rows.labelled:
            summary.count_classes(self.class_names, self.labels)
        summary.remarks.append(rows.remark)
        self.summary = summary.line()
        self.description: dict[str, str | int] = {
            "dataset": rows.path.name,
            "content_sha256": checked.content_sha256,
            "labels_sha256": hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest(),
            "images": len(self.labels),
        }
        self._decoder = Decoder(
            lambda index: rows.source(int(kept[index])), self.labels, image_size, mode_of(channels, options), options
        )

    def name_of(self, index: int) -> str:
        """Return how an image is called in messages."""
        return f"row {self._kept[index]}"


def _load(path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_bytes()).get("splits", [])
        choice = next((name for name in splits if name.startswith("train")), next(iter(splits), "train"))
        raise DataError(f"{path} contains splits of a data set, {shorten(splits)}; use one: --data {path / choice}")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is a Hugging Face data set, which needs the package datasets: {install_command('hf')}"
        ) from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # errors of files, JSON and Arrow have many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as a Hugging Face data set: {reason}") from error
    return dataset


def _columns(dataset: Any) -> str:
    kinds = {
        name: feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__
        for name, feature in dataset.features.items()
    }
    return shorten(f"{name} ({kind})" for name, kind in kinds.items()) or "none"


def _having(dataset: Any, kind: str) -> list[str]:
    return [name for name, feature in dataset.features.items() if type(feature).__name__ == kind]


def _image_column(path: Path, dataset: Any, options: DataConfig) -> str:
    wanted, field = options.image_column, options.column_field
    found = _having(dataset, "Image")
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted in found:
        assert wanted is not None  # noqa: S101  # an element of a list of names
        return wanted
    problem = (
        f"{field} is {wanted!r}, which is no column of images"
        if wanted is not None
        else f"{len(found)} columns contain images: choose one with --set {field}=NAME"
        if found
        else "no column contains images (of the type datasets.Image)"
    )
    raise DataError(f"{path}: {problem}; its columns are {_columns(dataset)}")


def _label_column(path: Path, dataset: Any, wanted: str | None) -> str:
    if wanted is not None and wanted in dataset.features:
        return wanted
    found = _having(dataset, "ClassLabel")
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted is None and not found and "label" in dataset.features:
        return "label"
    problem = (
        f"data.label_column is {wanted!r}, which is no column"
        if wanted is not None
        else f"{len(found)} columns contain classes: choose one with --set data.label_column=NAME"
        if found
        else "no column contains classes: choose one of integers or texts with --set data.label_column=NAME, or train "
        "without, --set class_conditional=false"
    )
    raise DataError(f"{path}: {problem}; its columns are {_columns(dataset)}")


def _labels(path: Path, dataset: Any, column: str) -> tuple[IntArray, tuple[str, ...]]:
    """Return the label of each row, and the names of the classes."""
    feature = dataset.features[column]
    values = dataset.data.column(column).to_pylist()
    if missing := sum(value is None for value in values):
        raise DataError(f"{path}: {missing:,} of {len(values):,} rows have no value in the column {column!r}")
    if all(isinstance(value, str) for value in values):
        names = sorted_class_names(set(values))
        number = {name: label for label, name in enumerate(names)}
        return np.array([number[value] for value in values], np.int64), names
    if not all(isinstance(value, int) for value in values):
        raise DataError(f"{path}: the column {column!r} must contain classes, integers or texts; got {feature}")
    labels = np.array(values, np.int64)
    named = getattr(feature, "names", None)
    names = tuple(named) if named else tuple(map(str, range(int(labels.max()) + 1)))
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f"{path}: labels must lie in 0..{len(names) - 1}; got {labels.min()}..{labels.max()} "
            "(-1 often means that a split has no labels: --set class_conditional=false)"
        )
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{path}: classes must be different names; repeated: {shorten(map(repr, repeated))}")
    if not named and (unused := sorted(set(range(len(names))) - set(values))):
        raise DataError(
            f"{path}: labels must count from 0 without gaps; {shorten(map(str, unused))} have no image: make the "
            f"column {column!r} one of classes, with dataset.class_encode_column({column!r})"
        )
    return labels, names
