"""Watchdog: says when an engine step hangs. Pure: whoever looks brings the time."""

from __future__ import annotations

from dataclasses import dataclass

HANG_FLOOR_S = 10.0
"""No step younger than this hangs."""
HANG_FACTOR = 20.0
"""Nor one that has taken less than so many times what was expected."""
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, eq=False)
class StepUnderWay:
    """An engine step, or an attempt at one, that has not ended."""

    expected_s: float
    """What it takes by the costs measured so far; 0 where there are none."""


class Watchdog:
    """Counts how long the same step has been seen.

    Time in which nobody looked counts as two looks at most: a process that was stopped, or a machine that was
    suspended, is not a step that hangs.
    """

    def __init__(self) -> None:
        self._step: StepUnderWay | None = None
        self._seen_at = 0.0
        self._age_s = 0.0

    def hangs(self, step: StepUnderWay | None, now: float) -> bool:
        """Look at the step that is under way, if any, and say whether it hangs.

        Args:
            step: the same object as long as it is the same step.
            now: time.monotonic(), or any other clock that never goes back.
        """
        if step is None or step is not self._step:
            self._step, self._age_s = step, 0.0
        else:
            self._age_s += min(now - self._seen_at, 2 * LOOK_EVERY_S)
        self._seen_at = now
        return step is not None and self._age_s > max(HANG_FLOOR_S, HANG_FACTOR * step.expected_s)
