"""Batch sizes: how many rows network calls may have. Which are compiled, which are tried, and what rows are padded to.

All of them are ascending. The manifest of an artifact calls those that it was exported for `buckets`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.errors import ModelError


def doubling_sizes(max_rows: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and the width itself: what a backend compiles where neither operator nor artifact says."""
    return up_to_width((1 << k for k in range(max_rows.bit_length())), max_rows)


def up_to_width(sizes: Iterable[int], max_rows: int) -> tuple[int, ...]:
    """Return the sizes that are below the width, and the width itself: where any size can be compiled."""
    return (*(size for size in sizes if size < max_rows), max_rows)


def covering_width(sizes: Iterable[int], max_rows: int) -> tuple[int, ...]:
    """Return the sizes that are below the width, and the next one: where no other can be had, as of built engines."""
    ascending = sorted(sizes)
    return tuple(ascending[: bisect_left(ascending, max_rows) + 1])


def sizes_to_try(max_rows: int) -> tuple[int, ...]:
    """Return what is tried where any size may be run: powers of two below the width, and one and a half times each."""
    powers = [1 << k for k in range(max_rows.bit_length())]
    return tuple(size for size in sorted({*powers, *(3 * p // 2 for p in powers)}) if size < max_rows)


def largest_size(compiled: Sequence[int] | None, max_rows: int, description: str) -> int:
    """Return the batch size that the others are compared with: the largest that was compiled, or the width.

    Args:
        compiled: the sizes that may be run; None: any.
        max_rows: the width.
        description: of the network, for the error.

    Raises:
        ModelError: the network was compiled for batches smaller than the width.
    """
    if compiled is None:
        return max_rows
    if max_rows > compiled[-1]:
        raise ModelError(
            f"{description}: max_rows must be at most {compiled[-1]}, the largest batch that it was compiled for; "
            f"got {max_rows}"
        )
    return compiled[-1]


def padded(rows: int, sizes: Sequence[int]) -> int:
    """Round a number of rows up to the next size; there must be one."""
    return sizes[bisect_left(sizes, rows)]


@dataclass
class BatchSizes:
    """The rows that calls may have, which a runner finds as it warms up; shared with what takes its steps."""

    network: tuple[int, ...]
    classifier: tuple[int, ...]
    """Empty where there is no classifier."""

    def padded_rows(self, rows: int) -> int:
        """Round up to the next batch size that the network may be run at."""
        return padded(rows, self.network)

    def padded_classified_rows(self, rows: int) -> int:
        """Round up to the next batch size that the classifier may be run at; 0 where there is none."""
        return padded(rows, self.classifier) if self.classifier else 0
