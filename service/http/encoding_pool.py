"""Encode images, and read large bodies, in a fixed number of threads, so that neither blocks the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from service.cpus import available_cpus

MAX_THREADS = 4
"""Encoders release the interpreter lock; more threads would take processor cores from the network."""

LARGE_BODY = 100_000
"""Bytes of a body that takes longer to read than to pass to another thread."""

P = ParamSpec("P")
T = TypeVar("T")


class EncodingPool:
    """A pool of encoding threads. Each request submits one function at a time, so the queue stays short."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, available_cpus().usable), thread_name_prefix="encode")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the threads."""
        return await asyncio.wrap_future(self._threads.submit(function, *args, **kwargs))

    async def run_if_large(self, body_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads a body: in one of the threads if that is `LARGE_BODY` or more, else at once."""
        if body_bytes < LARGE_BODY:
            return function(*args, **kwargs)
        return await self.run(function, *args, **kwargs)

    def close(self) -> None:
        """Cancel functions that have not begun, and end the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
