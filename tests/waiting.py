"""How long tests wait: every limit comes from here, and scales with the measured slowness of the machine.

A limit only ends a test that would hang; the result of a test does not depend on it. Limits of the code under test come
from here too (`scaled`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tests.counts import LONG

P = ParamSpec("P")
T = TypeVar("T")

SLOWNESS_VARIABLE = "TEST_SLOWNESS"
"""Overrides the measurement; processes started by a test run (those of xdist too) inherit the value."""
REFERENCE_S = 0.2
"""Seconds that `_compute` takes on the reference machine; about twice its time on an idle core of 2025."""
MOST = 16.0
POLL_S = 0.01
START_POLL_S = 0.1
"""Between two questions to a process that is starting, which needs the processor itself."""


def _compute() -> int:
    return sum(number * number % 7 for number in range(2_000_000))


def _measure() -> float:
    begun = time.perf_counter()
    _compute()
    return min(MOST, max(1.0, (time.perf_counter() - begun) / REFERENCE_S))


SLOWNESS = float(os.environ.get(SLOWNESS_VARIABLE) or _measure())
"""Factor by which this machine, with its other load, is slower than the reference; at least 1."""
os.environ[SLOWNESS_VARIABLE] = str(SLOWNESS)


def scaled(seconds: float) -> float:
    """Return the time that this machine needs for what takes an idle machine `seconds`."""
    return seconds * SLOWNESS


PATIENCE_S = scaled(7200 if LONG else 240)
"""How long a test waits for one thing."""
TEST_LIMIT_S = 2 * PATIENCE_S
"""How long a test may take with its fixtures."""


def until(holds: Callable[[], object], poll_s: float = POLL_S) -> None:
    """Wait until a condition holds; check it every `poll_s` seconds.

    Raises:
        TimeoutError: the condition never held.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition never held")
        time.sleep(poll_s)


async def eventually(holds: Callable[[], object | Awaitable[object]]) -> None:
    """Wait until a condition, which may be awaited, holds; `run_async` sets the limit."""
    while True:
        result = holds()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        await asyncio.sleep(POLL_S)


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; fail if it hangs."""
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_S))


def runs(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Make a test of a coroutine function."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_async(test(*args, **kwargs))

    return run
