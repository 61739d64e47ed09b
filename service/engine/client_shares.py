"""ClientShares: who has had more than an equal part, and should let others go first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from heapq import heappop, heappush

SLACK = 64
"""Clients without images that may be remembered before it is worth forgetting those who owe nothing."""


class ClientShares:
    """Row-steps of each client against an equal part for each.

    `fair` is what a client has had that was always here and always got an equal part: every step it grows by the rows
    given out, divided by the clients that have images in flight. A client starts at it, so that nobody saves up for
    later or starts in debt, and is **ahead** from when it has had `allowance` row-steps more until `fair` has come up
    to that. Few images per client: nobody is ever ahead, and the policy alone decides.
    """

    def __init__(self, allowance: float) -> None:
        self.ahead: set[str] = set()
        """Read by whoever sorts; changed here only."""
        self._allowance = allowance
        self._fair = 0.0
        self._had: dict[str, float] = {}
        self._images: Counter[str] = Counter()
        self._returns: list[tuple[float, str]] = []  # heap: value of `fair` at which a client may no longer be ahead

    def enter(self, client: str) -> None:
        """Count an image of a client in."""
        self._images[client] += 1
        if self._images[client] == 1:
            self._had[client] = max(self._had.get(client, 0.0), self._fair)

    def leave(self, client: str) -> None:
        """Count an image of a client out."""
        self._images[client] -= 1
        if not self._images[client]:
            del self._images[client]
            if len(self._had) > 2 * len(self._images) + SLACK:
                self._had = {who: had for who, had in self._had.items() if who in self._images or had > self._fair}

    def serve(self, rows: Mapping[str, int]) -> list[str]:
        """Take in a step's rows by client, before finished images leave; returns who began or ceased to be ahead."""
        self._fair += sum(rows.values()) / max(1, len(self._images))
        least, most = self._fair - self._allowance, self._fair + self._allowance
        changed = []
        for client, count in rows.items():
            had = self._had[client]
            self._had[client] = had = (least if had < least else had) + count
            if had > most and client not in self.ahead:
                self.ahead.add(client)
                heappush(self._returns, (had - self._allowance, client))
                changed.append(client)
        while self._returns and self._returns[0][0] <= self._fair:
            _, client = heappop(self._returns)
            until = self._had.get(client, 0.0) - self._allowance
            if until > self._fair:
                heappush(self._returns, (until, client))  # it was served meanwhile, for want of others
            else:
                self.ahead.remove(client)
                changed.append(client)
        return changed
