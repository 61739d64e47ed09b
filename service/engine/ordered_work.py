"""OrderedWork: a sorted container with fast sums of the work before a position, for thousands of entries."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from service.engine.request import Order

BLOCK = 256


class OrderedWork:
    """Sorted entries (order, work) in blocks with cached sums. Adding, removing and querying each process one block."""

    def __init__(self) -> None:
        self._blocks: list[list[tuple[Order, int]]] = []
        self._lasts: list[Order] = []
        self._sums: list[int] = []
        self.work = 0
        """Total work of all entries."""

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def __iter__(self) -> Iterator[Order]:
        """Iterate over the orders, least first. The entries must not change meanwhile."""
        return (order for block in self._blocks for order, _ in block)

    def add(self, order: Order, work: int) -> None:
        """Insert an entry. Its order must be unique."""
        self.work += work
        at = min(bisect_left(self._lasts, order), len(self._blocks) - 1)
        if at < 0:
            self._replace(0, 0, [[(order, work)]])
            return
        block = self._blocks[at]
        insort(block, (order, work))
        middle = len(block) // 2
        self._replace(at, 1, [block] if len(block) <= BLOCK else [block[:middle], block[middle:]])

    def remove(self, order: Order) -> None:
        """Remove an entry.

        Raises:
            KeyError: no entry has this order.
        """
        at = bisect_left(self._lasts, order)
        block = self._blocks[at] if at < len(self._blocks) else []
        place = bisect_left(block, (order,))
        if place == len(block) or block[place][0] != order:
            raise KeyError(order)
        self.work -= block.pop(place)[1]
        self._replace(at, 1, [block] if block else [])

    def before(self, order: Order) -> tuple[int, int]:
        """Return the number of entries before `order` and their total work."""
        at = bisect_left(self._lasts, order)
        count = sum(map(len, self._blocks[:at]))
        work = sum(self._sums[:at])
        if at < len(self._blocks):
            block = self._blocks[at]
            place = bisect_left(block, (order,))
            count += place
            work += sum(work for _, work in block[:place])
        return count, work

    def _replace(self, at: int, count: int, blocks: list[list[tuple[Order, int]]]) -> None:
        end = at + count
        self._blocks[at:end] = blocks
        self._lasts[at:end] = [block[-1][0] for block in blocks]
        self._sums[at:end] = [sum(work for _, work in block) for block in blocks]
