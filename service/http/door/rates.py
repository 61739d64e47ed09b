"""Limit the requests per minute of each client."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RequestRates:
    """One token bucket per client, which holds a minute's requests and fills at a constant rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, client: str, per_minute: int) -> float:
        """Count a request.

        Args:
            client: name of the client; all names are kept in memory, so there must be few.
            per_minute: the client's limit, which may change between requests.

        Returns:
            0, or for how many seconds the next request will not be taken; then this one was not counted.
        """
        now = self._clock()
        bucket = self._buckets.setdefault(client, _Bucket(per_minute, now))
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.filled_at) * per_minute / 60)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * 60 / per_minute
        bucket.tokens -= 1
        return 0.0
