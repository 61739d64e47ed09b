"""Mailbox: what the engine's thread saw, until the event loop has time to look; the newest replaces what was there."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from service.engine.request import Observation


class Mailbox:
    """Holds at most one observation of each kind of each watched image. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[tuple[type[Observation], str, int], Observation] = {}

    def put(self, observations: Sequence[Observation]) -> bool:
        """Leave observations; says whether the mailbox was empty, so that somebody must be told to look."""
        with self._lock:
            was_empty = not self._newest
            self._newest |= {(type(o), o.request_id, o.position): o for o in observations}
            return was_empty

    def take(self) -> list[Observation]:
        """Take everything out."""
        with self._lock:
            newest, self._newest = self._newest, {}
            return list(newest.values())
