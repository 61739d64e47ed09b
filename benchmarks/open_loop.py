"""An open-loop load generator: requests go out when they are due, whatever has become of earlier ones.

Latency counts from when a request was due, not from when it was sent: a generator that falls behind (it says by how
much) cannot hide what it held up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.traffic import Arrival

PATIENCE_S = 600.0
PLAIN = {"Accept-Encoding": "identity"}
"""Nobody compresses an answer; Triton cannot together with binary pixels."""
OK = 200
NEVER_ANSWERED = 0


@dataclass(frozen=True)
class Ask:
    """An HTTP request."""

    path: str
    body: Mapping[str, object]


@dataclass(frozen=True)
class Answer:
    """What became of an arrival; times in seconds from the begin of the load."""

    at: float
    """When it was due."""
    steps: int
    rows: int
    sent: float
    ended: float
    status: int
    """Of HTTP; `NEVER_ANSWERED` where the connection failed."""

    @property
    def latency(self) -> float:
        """From when it was due to the whole answer."""
        return self.ended - self.at

    @property
    def row_steps(self) -> int:
        """Its work."""
        return self.steps * self.rows


async def offer(
    client: httpx.AsyncClient,
    arrivals: Sequence[Arrival],
    ask: Callable[[int, Arrival], Ask],
    at_times: Sequence[tuple[float, Callable[[], Awaitable[None]]]] = (),
) -> list[Answer]:
    """Send requests when they are due, and wait for all answers.

    Args:
        client: of the server.
        arrivals: when to ask for what.
        ask: number and arrival to HTTP request.
        at_times: what else to do, and when.
    """
    begun = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - begun

    async def send(number: int, arrival: Arrival) -> Answer:
        await asyncio.sleep(arrival.at - now())
        asked, sent = ask(number, arrival), now()
        try:
            status = (await client.post(asked.path, json=asked.body)).status_code
        except httpx.TransportError:
            status = NEVER_ANSWERED
        return Answer(arrival.at, arrival.steps, arrival.rows, sent, now(), status)

    async def look(at: float, action: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(at - now())
        await action()

    looking = [asyncio.create_task(look(at, action)) for at, action in at_times]
    answers = await asyncio.gather(*(send(number, arrival) for number, arrival in enumerate(arrivals)))
    await asyncio.gather(*looking)
    return answers


def open_client(url: str) -> httpx.AsyncClient:
    """Return a client that keeps as many connections as there are requests in flight, and its patience."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(
        base_url=url, limits=limits, timeout=httpx.Timeout(PATIENCE_S), headers=PLAIN, trust_env=False
    )
