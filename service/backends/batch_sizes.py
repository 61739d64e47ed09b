"""Batch sizes of network calls: those that are compiled, those that the self-test tries, and padding to them.

All sequences are ascending. In the manifest of an artifact, the exported batch sizes are called `buckets`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.errors import ModelError


def doubling_sizes(max_rows: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and the width: the sizes to compile if neither operator nor artifact specifies any."""
    return up_to_width((1 << k for k in range(max_rows.bit_length())), max_rows)


def close_sizes(max_rows: int) -> tuple[int, ...]:
    """Return 1, 2, 4, 8, 16, 24, ... and the width: multiples of 8, and above 64 eight sizes per power of two.

    For a device on which compiling a size costs little: padding then adds less than a third of the rows above 16.
    """
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + max(8, (1 << (sizes[-1].bit_length() - 1)) // 8))
    return up_to_width(sizes, max_rows)


def up_to_width(sizes: Iterable[int], max_rows: int) -> tuple[int, ...]:
    """Return the sizes below the width, and the width; for backends that can compile any size."""
    return (*(size for size in sizes if size < max_rows), max_rows)


def covering_width(sizes: Iterable[int], max_rows: int) -> tuple[int, ...]:
    """Return the sizes below the width, and the next one; for backends that have given sizes only (built engines)."""
    ascending = sorted(sizes)
    return tuple(ascending[: bisect_left(ascending, max_rows) + 1])


def sizes_to_try(max_rows: int) -> tuple[int, ...]:
    """Return the sizes to test if any size may be run: below the width, powers of two and 1.5 times each."""
    powers = [1 << k for k in range(max_rows.bit_length())]
    return tuple(size for size in sorted({*powers, *(3 * p // 2 for p in powers)}) if size < max_rows)


def largest_size(compiled: Sequence[int] | None, max_rows: int, description: str) -> int:
    """Return the reference batch size of the self-test: the largest compiled size, or the width.

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
    """Return the smallest size that holds the rows; there must be one."""
    return sizes[bisect_left(sizes, rows)]


@dataclass
class BatchSizes:
    """The batch sizes that calls may use. The runner sets them in warm-up; the code that runs its steps shares them."""

    network: tuple[int, ...]
    classifier: tuple[int, ...]
    """Empty without a classifier."""

    @property
    def most_rows(self) -> int:
        """Return the rows that every call can hold."""
        return min(sizes[-1] for sizes in (self.network, self.classifier) if sizes)

    def padded_rows(self, rows: int) -> int:
        """Return the smallest batch size of the network that holds the rows."""
        return padded(rows, self.network)

    def padded_classified_rows(self, rows: int) -> int:
        """Return the smallest batch size of the classifier that holds the rows; 0 without a classifier."""
        return padded(rows, self.classifier) if self.classifier else 0
