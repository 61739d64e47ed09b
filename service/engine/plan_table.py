"""Where sampling plans lie in a model's table: reference-counted ranges of lines, kept until the space is needed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from service.engine.request import PlanKey


@dataclass
class _Entry:
    offset: int
    lines: int
    references: int = 0
    written: bool = False


@dataclass(frozen=True)
class PlanRange:
    """Where a plan lies."""

    offset: int
    fresh: bool
    """Whether its lines are not known to be written."""


class PlanTable:
    """Bookkeeping of a table of fixed capacity; the runner owns the lines themselves.

    A plan nobody uses any more stays, so that the next request for it finds it, and is forgotten, the one unused
    for longest first, when another plan needs its lines.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[PlanKey, _Entry] = OrderedDict()  # least recently released first

    def acquire(self, key: PlanKey, lines: int) -> PlanRange | None:
        """Reserve room for a plan, or share what is there; None while plans in use leave no room.

        Raises:
            ValueError: a plan that can never fit.
        """
        if lines > self.capacity:
            raise ValueError(f"a plan of {lines} steps does not fit a table of {self.capacity} lines")
        entry = self._entries.get(key)
        if entry is None:
            offset = self._make_room(lines)
            if offset is None:
                return None
            entry = self._entries[key] = _Entry(offset, lines)
        entry.references += 1
        return PlanRange(entry.offset, fresh=not entry.written)

    def confirm(self, key: PlanKey) -> None:
        """Take note that the lines of a plan in use are written."""
        self._entries[key].written = True

    def doubt(self, key: PlanKey) -> None:
        """Take note that a plan's lines may not be written after all; they may be gone, too."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.written = False

    def release(self, key: PlanKey) -> None:
        """Give back one reference."""
        entry = self._entries[key]
        entry.references -= 1
        self._entries.move_to_end(key)

    def _make_room(self, lines: int) -> int | None:
        while (offset := self._first_fit(lines)) is None:
            idle = next((key for key, entry in self._entries.items() if entry.references == 0), None)
            if idle is None:
                return None
            del self._entries[idle]
        return offset

    def _first_fit(self, lines: int) -> int | None:
        end = 0
        for entry in sorted(self._entries.values(), key=lambda e: e.offset):
            if entry.offset - end >= lines:
                return end
            end = entry.offset + entry.lines
        return end if self.capacity - end >= lines else None
