"""Pairs of which one image turns out to be unreadable: another pair takes their place."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.dataset import DataError, IntArray, Uint8Array
from trainer.data.decoder import FOUND_BEFORE, stand_ins
from trainer.data.pairs import Side
from trainer.run_folder import warn

Draws = npt.NDArray[np.floating] | None


OTHER_PART = -1
"""Label of pairs that are not members."""


class SingleImages(Side, Protocol):
    """One side of the pairs, whose images can be read one by one."""

    def images(self, indices: IntArray, draws: Draws = None) -> Uint8Array:
        """Return some of the images; arguments as for `Dataset`."""
        ...

    def image(self, index: int) -> Uint8Array:
        """Decode one image, [height, width, channels], without a replacement.

        Raises:
            DataError: it cannot be read.
        """
        ...


class SkippingPairs:
    """Reads pairs; one that is unreadable is replaced by the next readable pair of its class.

    The replacement is a function of the data only, so that a resumed run trains on the same pairs.

    Args:
        images: opened with `data.unreadable=fail`.
        conditions: the conditioning images, in the same order, opened in the same way.
        members: numbers of the pairs that are read, and may replace one another; None: all.
    """

    def __init__(self, images: SingleImages, conditions: SingleImages, members: IntArray | None = None) -> None:
        self._images, self._conditions = images, conditions
        self._members = np.arange(len(images.labels)) if members is None else members
        self._labels = np.full_like(images.labels, OTHER_PART)
        self._labels[self._members] = images.labels[self._members]
        self._replaced: dict[int, int] = {}
        """The pair that takes the place of each pair found to be unreadable."""

    def originals(self, indices: IntArray, draws: Draws = None) -> Uint8Array:
        """Return images without their conditioning images; arguments as for `Dataset`."""
        return self.pairs(indices, draws)[0]

    def images(self, indices: IntArray, draws: Draws = None) -> Uint8Array:
        """Return conditioning images; arguments as for `Dataset`."""
        return self.pairs(indices, draws)[1]

    def pairs(self, indices: IntArray, draws: Draws = None) -> tuple[Uint8Array, Uint8Array]:
        """Return images and their conditioning images; arguments as for `Dataset`.

        Raises:
            DataError: no pair of a class can be read.
        """
        used = self._used(indices)
        try:
            return self._images.images(used, draws), self._conditions.images(used, draws)
        except DataError:  # find out which pairs: seldom, and slow
            for index in dict.fromkeys(used.tolist()):
                if (error := self._error_of(index)) is not None:
                    self._replace(index, error)
        used = self._used(indices)
        return self._images.images(used, draws), self._conditions.images(used, draws)

    def part(self, indices: IntArray) -> SkippingPairs:
        """Return a reader of some of the pairs, which replaces them by one another only."""
        return SkippingPairs(self._images, self._conditions, self._members[indices])

    def _used(self, indices: IntArray) -> IntArray:
        used = self._members[indices].tolist()
        for position, index in enumerate(used):
            while index in self._replaced:
                index = self._replaced[index]  # follows the replacements of replacements
            used[position] = index
        return np.array(used, np.int64)

    def _error_of(self, index: int) -> DataError | None:
        for side in (self._images, self._conditions):
            try:
                side.image(index)
            except DataError as error:
                return error
        return None

    def _replace(self, index: int, error: DataError) -> None:
        for other in stand_ins(self._labels, index):
            if other in self._replaced:  # even if it is readable by now: two pairs must not replace each other
                continue
            if self._error_of(other) is None:
                self._replaced[index] = other
                mine, theirs = self._images.name_of(index), self._conditions.name_of(index)
                warn(
                    f"{error}; the pair of image {mine} and conditioning image {theirs} is replaced by that of image "
                    f"{self._images.name_of(other)}; unreadable pairs found so far: {len(self._replaced)}"
                )
                return
        raise DataError(f"{error}; no pair of its class can be read; {FOUND_BEFORE}") from error
