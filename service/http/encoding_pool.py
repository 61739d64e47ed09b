"""Encode images in a fixed number of threads, so that encoding does not block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from service.cpus import available_cpus

MAX_THREADS = 4
"""Encoders release the interpreter lock; more threads would take processor cores from the network."""

P = ParamSpec("P")
T = TypeVar("T")


class EncodingPool:
    """A pool of encoding threads. Each request submits one function at a time, so the queue stays short."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, available_cpus().usable), thread_name_prefix="encode")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in one of the threads."""
        return await asyncio.wrap_future(self._threads.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Cancel functions that have not begun, and end the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
