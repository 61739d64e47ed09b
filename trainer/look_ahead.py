"""LookAhead: compute the next values of a pure function in a thread, a bounded number ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

DEPTH = 2
"""Batches that are drawn ahead."""


class LookAhead(Generic[T]):
    """The values of `draw` at given positions, in order.

    Because `draw` is a function of the position alone, drawing ahead changes no value.
    """

    def __init__(self, draw: Callable[[int], T], positions: Iterator[int], pool: ThreadPoolExecutor) -> None:
        self._draw = draw
        self._positions = positions
        self._pool = pool
        self._ahead: deque[Future[T]] = deque()
        for _ in range(DEPTH):
            self._submit()

    def take(self) -> T:
        """Return the next value, and raise what `draw` raised for it.

        Raises:
            IndexError: there is no further position.
        """
        value = self._ahead.popleft()
        self._submit()
        return value.result()

    def _submit(self) -> None:
        for position in self._positions:
            self._ahead.append(self._pool.submit(self._draw, position))
            return


@contextmanager
def looking_ahead(draw: Callable[[int], T], positions: Iterator[int]) -> Iterator[LookAhead[T]]:
    """Draw in a thread of its own inside; at the end wait for the value that is being drawn, and discard the others."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="look-ahead")
    try:
        yield LookAhead(draw, positions, pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
