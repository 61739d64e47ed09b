"""Pairs: images with a conditioning image each, of equal size, in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from diffusion.quoting import printable
from trainer.data.dataset import Conditions, DataError, Dataset, Float32Array, IntArray, Uint8Array
from trainer.data.listing import shorten
from trainer.data.part import Part

Draws = npt.NDArray[np.floating] | None


class Side(Dataset, Protocol):
    """One side of the pairs: the images, or the conditioning images."""

    def name_of(self, index: int) -> str:
        """Return how an image is called in messages."""
        ...


class Reader(Conditions, Protocol):
    """Reads pairs."""

    def originals(self, indices: IntArray, draws: Draws = None) -> Uint8Array | Float32Array:
        """Return images without their conditioning images; arguments as for `Dataset`."""
        ...

    def part(self, indices: IntArray) -> Reader:
        """Return a reader of some of the pairs, which replaces them by one another only."""
        ...


class TwoSides:
    """Reads each side of the pairs by itself."""

    def __init__(self, images: Dataset, conditions: Dataset) -> None:
        self._images, self._conditions = images, conditions

    def originals(self, indices: IntArray, draws: Draws = None) -> Uint8Array | Float32Array:
        """Return images without their conditioning images; arguments as for `Dataset`."""
        return self._images.images(indices, draws)

    def images(self, indices: IntArray, draws: Draws = None) -> Uint8Array | Float32Array:
        """Return conditioning images; arguments as for `Dataset`."""
        return self._conditions.images(indices, draws)

    def pairs(
        self, indices: IntArray, draws: Draws = None
    ) -> tuple[Uint8Array | Float32Array, Uint8Array | Float32Array]:
        """Return images and their conditioning images; arguments as for `Dataset`."""
        return self.originals(indices, draws), self.images(indices, draws)

    def part(self, indices: IntArray) -> TwoSides:
        """Return a reader of some of the pairs."""
        return TwoSides(self._images.part(indices), self._conditions.part(indices))


class Pairs:
    """A data set whose image k belongs to conditioning image k.

    Scaling and cropping depend on an image's size and the draws only, so that both sides of a pair show the same part.
    """

    def __init__(self, path: Path, images: Side, conditions: Side, reader: Reader | None = None) -> None:
        """Check that both sides fit.

        Args:
            path: of the data, for messages.
            images: the images.
            conditions: their conditioning images.
            reader: reads both; None: each side by itself.

        Raises:
            DataError: numbers or sizes differ.
        """
        _check_sizes(path, images, conditions)
        self._reader: Reader = reader or TwoSides(images, conditions)
        self.conditions: Conditions | None = self._reader
        self.sizes = images.sizes
        self.labels = images.labels
        self.class_names = images.class_names
        theirs = {f"cond_{name}": value for name, value in conditions.description.items()}
        self.description: dict[str, str | int] = {**images.description, **theirs}
        self.summary = f"{images.summary}\n{conditions.summary}"

    def images(self, indices: IntArray, draws: Draws = None) -> Uint8Array | Float32Array:
        """Return some of the images; arguments as for `Dataset`."""
        return self._reader.originals(indices, draws)

    def part(self, indices: IntArray) -> Part:
        """Return some of the pairs as a data set; see `Dataset`."""
        reader = self._reader.part(indices)
        return Part(self, indices, reader.originals, reader)


def _check_sizes(path: Path, images: Side, conditions: Side) -> None:
    counts = len(images.sizes), len(conditions.sizes)
    if counts[0] != counts[1]:
        raise DataError(
            f"{path}: there must be as many conditioning images as images, {counts[0]:,}; got {counts[1]:,}"
        )
    different = np.flatnonzero((images.sizes != conditions.sizes).any(axis=1)).tolist()
    if different:
        examples = (
            f"{images.name_of(k)} is {_size(images.sizes[k])}, its conditioning image {_size(conditions.sizes[k])}"
            for k in different
        )
        raise DataError(
            f"{path}: an image and its conditioning image must have the same size; {len(different):,} of {counts[0]:,} "
            f"pairs do not: {shorten(examples)}"
        )


def _size(size: npt.NDArray[np.int64]) -> str:
    height, width = size.tolist()
    return f"{width}x{height}"


def files_of_pairs(folder: Path, files: Sequence[str], cond_folder: Path, conds: Sequence[str]) -> list[str]:
    """Return the conditioning image of each file: the one of the same name, whatever its suffix.

    Args:
        folder: of the images.
        files: paths below it.
        cond_folder: of the conditioning images.
        conds: paths below it.

    Raises:
        DataError: a file has no counterpart, or two files of a folder have one name; they are named.
    """
    mine, theirs = _by_name(folder, files), _by_name(cond_folder, conds)
    problems = [
        f"{len(names):,} {what}: {shorten(map(printable, names))}"
        for what, names in (
            (
                f"images have no conditioning image in {cond_folder}",
                [file for name, file in mine.items() if name not in theirs],
            ),
            (
                f"conditioning images have no image in {folder}",
                [file for name, file in theirs.items() if name not in mine],
            ),
        )
        if names
    ]
    if problems:
        raise DataError(
            f"image and conditioning image must have the same name below their folders; {'; '.join(problems)}"
        )
    return [theirs[name] for name in mine]


def _by_name(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Return the files by their paths without suffix, in the same order."""
    found: dict[str, str] = {}
    for file in files:
        name = str(Path(file).with_suffix(""))
        if name in found:
            raise DataError(
                f"{folder}: {printable(found[name])} and {printable(file)} have the same name but for their suffix, so "
                "that their pair is not certain; rename one"
            )
        found[name] = file
    return found
