"""ClientShares: find the clients that received more than an equal share and should yield to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from heapq import heappop, heappush

SLACK = 64
"""Number of idle clients to keep before removing those without debt."""


class ClientShares:
    """Compare the row-steps of each client with an equal share.

    `fair` is the service of a hypothetical client that was always present and always received an equal share: each
    step adds the rows served, divided by the number of clients with images in flight. A client starts at `fair`, so it
    starts with neither credit nor debt. It becomes **ahead** when it has received more than `fair + allowance`
    row-steps, and stays ahead until `fair + allowance` has caught up. With few images per client no client is ever
    ahead, and only the policy decides the order.
    """

    def __init__(self, allowance: float) -> None:
        self.ahead: set[str] = set()
        """Read by the code that sorts images; modified only by this class."""
        self._allowance = allowance
        self._fair = 0.0
        self._had: dict[str, float] = {}
        self._images: Counter[str] = Counter()
        self._returns: list[tuple[float, str]] = []  # heap: value of `fair` at which a client may no longer be ahead

    def enter(self, client: str) -> None:
        """Count an image that enters for a client."""
        self._images[client] += 1
        if self._images[client] == 1:
            self._had[client] = max(self._had.get(client, 0.0), self._fair)

    def leave(self, client: str) -> None:
        """Count an image that leaves for a client."""
        self._images[client] -= 1
        if not self._images[client]:
            del self._images[client]
            if len(self._had) > 2 * len(self._images) + SLACK:
                self._had = {who: had for who, had in self._had.items() if who in self._images or had > self._fair}

    def serve(self, rows: Mapping[str, int]) -> list[str]:
        """Record a step's rows by client, before finished images leave; return the clients whose state changed.

        A client's state changes when it becomes ahead or stops being ahead.
        """
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
                heappush(self._returns, (until, client))  # it was served again because no other client could be
            else:
                self.ahead.remove(client)
                changed.append(client)
        return changed
