"""Limit open connections below the free file descriptors, so that the service can always answer health checks."""

from __future__ import annotations

import logging
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SPARE_DESCRIPTORS = 64
"""Reserved for other files (keys, models, pages, a collector of traces) and for connections that open or close."""
UNKNOWN_DESCRIPTORS = 32
"""Assumed to be open if the system does not list them."""
LARGEST_LIMIT = 1 << 20
"""The default limit of Linux; assumed if the system has none."""
WARN_EVERY_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DescriptorBudget:
    """The share of the limit of open files (`ulimit -n`) that is left for connections."""

    connections: int
    """Maximum number of open connections."""
    accepts: int
    """Maximum number of connections accepted at once, before those beyond `connections` are closed."""


def descriptor_budget() -> DescriptorBudget:
    """Return how the free file descriptors of this process are divided."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = LARGEST_LIMIT
    spare = min(SPARE_DESCRIPTORS, limit // 4)
    return DescriptorBudget(max(1, limit - _open_descriptors() - spare), max(1, spare // 4))


def _open_descriptors() -> int:
    try:
        return sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:
        return UNKNOWN_DESCRIPTORS


class Closable(Protocol):
    """A connection that can be closed."""

    def make_room(self) -> None:
        """Close the connection at once: another one needs its place."""
        ...


class OpenConnections:
    """The connections of a server. A new one beyond the limit takes the place of the one that is idle longest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Closable] = set()
        self._idle: dict[Closable, None] = {}  # in the order in which they became idle
        self._warned_at = -WARN_EVERY_S

    def enter(self, connection: Closable) -> bool:
        """Count a new connection, which is idle; return False if there is no place for it."""
        if len(self._open) >= self._most:
            self._close_longest_idle()
        has_place = len(self._open) < self._most
        self._open.add(connection)
        self._idle[connection] = None
        return has_place

    def mark(self, connection: Closable, idle: bool) -> None:
        """Note whether a connection is without a request."""
        if not idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def leave(self, connection: Closable) -> None:
        """Forget a connection that is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def _close_longest_idle(self) -> None:
        longest = next(iter(self._idle), None)
        now = time.monotonic()
        if now >= self._warned_at + WARN_EVERY_S:
            self._warned_at = now
            made = "idle ones are closed for new ones" if longest is not None else "all are busy, new ones are refused"
            log.warning("connections: %d are open, the most that the limit of open files allows; %s", self._most, made)
        if longest is not None:
            self.leave(longest)
            longest.make_room()
