"""Send the requests of a load through the client, and record what became of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cli.client import AsyncClient, ClientError, RequestFailed, UnexpectedAnswer
from cli.load.loops import Clock
from cli.load.mixture import RequestKind, draw_request
from service.http.native.schemas import Timing

OK = 200
LATEST = 2000
"""Answers whose latency is shown while a load runs."""


class RequestRecord(BaseModel):
    """What became of a request; times in seconds since the start of the load."""

    model_config = ConfigDict(frozen=True)

    kind: str
    due_s: float
    """When it was planned to be sent."""
    sent_s: float
    ended_s: float
    outcome: Literal["answered", "failed", "unfinished"]
    """Unfinished: it had no answer when the load was ended by hand."""
    status: int | None = None
    """HTTP status; None without an answer."""
    error: str | None = None
    images: int = 0
    timing: Timing | None = None
    """Waiting and finish times that the service predicted and measured."""

    @property
    def latency_s(self) -> float:
        """Seconds from the planned time to the complete answer, so that delays of the generator are included."""
        return self.ended_s - self.due_s


class Recorder:
    """Sends requests, and keeps a record of each; the client must not retry."""

    def __init__(self, client: AsyncClient, kinds: Sequence[RequestKind], seed: int, now: Clock) -> None:
        self.records: list[RequestRecord] = []
        """Of the requests that have ended, in the order of their ends."""
        self.answered = 0
        """Number of the records with images."""
        self.latest_latencies_s: deque[float] = deque(maxlen=LATEST)
        """Of the latest answers; a long load has too many to look at all of them while it runs."""
        self._client = client
        self._kinds = kinds
        self._seed = seed
        self._now = now
        self._in_flight: dict[int, dict[str, Any]] = {}

    @property
    def in_flight(self) -> int:
        """Number of requests without an answer so far."""
        return len(self._in_flight)

    async def send(self, number: int, due_s: float) -> bool:
        """Send a request and record its end; return whether it was answered with images."""
        kind, fields = draw_request(self._kinds, self._seed, number)
        known = self._in_flight[number] = {"kind": kind.name, "due_s": round(due_s, 6), "sent_s": self._now()}
        end: dict[str, Any]
        try:
            answer = await self._client.generate(**fields)
        except ClientError as error:
            end = {"outcome": "failed", "status": _status_of(error), "error": _reason(error)}
        else:
            end = {"outcome": "answered", "status": OK, "images": len(answer.images), "timing": answer.timing}
        del self._in_flight[number]
        record = RequestRecord(**known, ended_s=self._now(), **end)
        self.records.append(record)
        if record.outcome != "answered":
            return False
        self.answered += 1
        self.latest_latencies_s.append(record.latency_s)
        return True

    def give_up(self) -> None:
        """Record the requests in flight, whose tasks were cancelled, as unfinished."""
        self.records += [
            RequestRecord(**known, ended_s=self._now(), outcome="unfinished") for known in self._in_flight.values()
        ]
        self._in_flight.clear()


def _status_of(error: ClientError) -> int | None:
    if isinstance(error, RequestFailed):
        return error.problem.status
    return error.status if isinstance(error, UnexpectedAnswer) else None


def _reason(error: ClientError) -> str:
    """Return the reason without what differs between requests, so that equal reasons can be counted."""
    return error.problem.title if isinstance(error, RequestFailed) else str(error)
