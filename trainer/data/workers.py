"""A bounded pool of threads that prepares the images of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

MOST_WORKERS = 8


class Workers:
    """Threads that share the images of a batch; Pillow releases the interpreter lock while it decodes and scales."""

    def __init__(self, workers: int | None) -> None:
        self._count = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="images") if self._count > 1 else None

    def each(self, count: int, work: Callable[[int], None]) -> None:
        """Call `work(position)` for each position in 0..count-1, and wait.

        Raises:
            Exception: of the first call that failed.
        """

        def some(start: int) -> None:
            for position in range(start, count, self._count):
                work(position)

        for _ in (map if self._threads is None else self._threads.map)(some, range(self._count)):
            pass
