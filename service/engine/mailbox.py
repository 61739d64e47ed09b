"""Mailbox: pass observations from the engine thread to the event loop; a newer one replaces an unread one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from service.engine.request import Observation


class Mailbox:
    """Holds at most one observation of each kind per watched image. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[tuple[type[Observation], str, int], Observation] = {}

    def put(self, observations: Sequence[Observation]) -> bool:
        """Store observations. Return whether the mailbox was empty, in which case the reader must be notified."""
        with self._lock:
            was_empty = not self._newest
            self._newest |= {(type(o), o.request_id, o.position): o for o in observations}
            return was_empty

    def take(self) -> list[Observation]:
        """Remove and return all observations."""
        with self._lock:
            newest, self._newest = self._newest, {}
            return list(newest.values())
