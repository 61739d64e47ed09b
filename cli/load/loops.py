"""When the requests of a load are sent: at planned times (open loop), or each after an answer (closed loop)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator

PAUSE_AFTER_FAILURE_S = 0.1
"""Pause of a closed loop's client after a failed request. A refusal takes a millisecond, and the client would otherwise
send nothing but requests that are refused."""

Clock = Callable[[], float]
"""Seconds since the start of the load."""
Send = Callable[[int, float], Awaitable[bool]]
"""Sends a request, given its number and the time when it was due; returns at its end, whether it was answered."""


def poisson_times(rate: float, seconds: float, draw: random.Random) -> Iterator[float]:
    """Draw the times of a Poisson process.

    Args:
        rate: mean number of requests per second.
        seconds: end of the load.
        draw: random generator.

    Yields:
        Times in [0, seconds), ascending.
    """
    at = draw.expovariate(rate)
    while at < seconds:
        yield at
        at += draw.expovariate(rate)


async def open_loop(due: Iterable[float], send: Send, now: Clock) -> None:
    """Send requests at planned times, whatever became of earlier ones; return when all have ended.

    If the event loop was held up, the requests that became due meanwhile are sent at once: none is omitted.

    Args:
        due: times, ascending.
        send: called as a task for each request.
        now: the time.
    """
    async with asyncio.TaskGroup() as group:
        for number, at in enumerate(due):
            await asyncio.sleep(at - now())
            group.create_task(_ended(send(number, at)))


async def closed_loop(clients: int, seconds: float, send: Send, now: Clock) -> None:
    """Keep requests in flight: each client sends its next one when its last one has ended.

    Args:
        clients: number of requests in flight.
        seconds: end of the load; the requests then in flight are waited for.
        send: awaited by a client for each request.
        now: the time.
    """
    numbers = itertools.count()

    async def keep_sending() -> None:
        while (due := now()) < seconds:
            if not await send(next(numbers), due):
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(keep_sending())


async def _ended(sending: Awaitable[bool]) -> None:
    await sending
