"""An open-loop load generator for any server: requests are sent when they are due (`cli.load.loops`).

Latency is measured from the time at which a request was due, not sent, so delays of the generator (which it
reports) are included.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.traffic import Arrival
from cli.load.loops import open_loop

PATIENCE_S = 600.0
PLAIN = {"Accept-Encoding": "identity"}
"""Answers are not compressed; Triton cannot compress answers with binary pixels."""
OK = 200
NEVER_ANSWERED = 0


@dataclass(frozen=True)
class Ask:
    """An HTTP request."""

    path: str
    body: Mapping[str, object]


@dataclass(frozen=True)
class Answer:
    """Result of an arrival; times in seconds since the start of the load."""

    at: float
    """When it was due."""
    steps: int
    rows: int
    sent: float
    ended: float
    status: int
    """HTTP status; `NEVER_ANSWERED` if the connection failed."""

    @property
    def latency(self) -> float:
        """Seconds from its due time to the complete answer."""
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
        client: HTTP client of the server.
        arrivals: requests and their due times.
        ask: builds the HTTP request from number and arrival.
        at_times: other actions, by time.
    """
    begun = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - begun

    answers: dict[int, Answer] = {}

    async def send(number: int, _: float) -> bool:
        arrival = arrivals[number]
        asked, sent = ask(number, arrival), now()
        try:
            status = (await client.post(asked.path, json=asked.body)).status_code
        except httpx.TransportError:
            status = NEVER_ANSWERED
        answers[number] = Answer(arrival.at, arrival.steps, arrival.rows, sent, now(), status)
        return status == OK

    async def look(at: float, action: Callable[[], Awaitable[None]]) -> None:
        await asyncio.sleep(at - now())
        await action()

    looking = [asyncio.create_task(look(at, action)) for at, action in at_times]
    await open_loop([arrival.at for arrival in arrivals], send, now)
    await asyncio.gather(*looking)
    return [answers[number] for number in range(len(arrivals))]


def open_client(url: str) -> httpx.AsyncClient:
    """Return a client without a limit of connections, with its timeout."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(
        base_url=url, limits=limits, timeout=httpx.Timeout(PATIENCE_S), headers=PLAIN, trust_env=False
    )
