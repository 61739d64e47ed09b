"""PlanCache: the sampling plans used last, within a bound of memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

PLAN_BYTES = 1024
"""Memory of a plan and its key beside its arrays, about."""


class HasArrays(Protocol):
    """A plan."""

    @property
    def nbytes(self) -> int:
        """Return the memory of its arrays."""
        ...


P = TypeVar("P", bound=HasArrays)


@dataclass(eq=False)
class _Entry(Generic[P]):
    plan: P
    used: int
    """Number of its last use."""


class PlanCache(Generic[P]):
    """Plans by key. Any thread may use it. The newest plan is kept even if it is larger than the bound."""

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        """Memory of all plans, at most `max_bytes` with more than one."""
        self._max_bytes = max_bytes
        self._entries: dict[Hashable, _Entry[P]] = {}
        self._uses = itertools.count()
        self._lock = threading.Lock()
        """Held while entries are added and removed. Uses need none: every image of every step is one."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, build: Callable[[], P]) -> P:
        """Return the plan of a key; build it, without the lock, if it is not there.

        Raises:
            Exception: as `build`; nothing is kept.
        """
        entry = self._entries.get(key)
        if entry is None:
            return self._add(key, build())
        entry.used = next(self._uses)
        return entry.plan

    def _add(self, key: Hashable, plan: P) -> P:
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(plan, -1))
            if entry.plan is plan:  # no other thread has built it meanwhile
                self.nbytes += _size(plan)
            entry.used = next(self._uses)
            if self.nbytes > self._max_bytes:
                self._remove_oldest()
            return entry.plan

    def _remove_oldest(self) -> None:
        """Remove the plans used longest ago until the others fit."""
        by_use = sorted(self._entries.items(), key=lambda item: item[1].used)
        for key, entry in by_use[:-1]:
            if self.nbytes <= self._max_bytes:
                break
            del self._entries[key]
            self.nbytes -= _size(entry.plan)


def _size(plan: HasArrays) -> int:
    return plan.nbytes + PLAN_BYTES
