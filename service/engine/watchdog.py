"""Watchdog: detect an engine step that hangs. It reads no clock; the caller passes the time."""

from __future__ import annotations

from dataclasses import dataclass

HANG_FLOOR_S = 10.0
"""Minimum age in seconds of a step that counts as hung."""
HANG_FACTOR = 20.0
"""Minimum age of a step that counts as hung, as a multiple of its expected duration."""
CHECK_INTERVAL_S = 0.5
"""Seconds between two checks."""


@dataclass(frozen=True, eq=False)
class StepUnderWay:
    """An engine step, or an attempt at one, that has not ended."""

    expected_s: float
    """Expected duration by the costs measured so far; 0 if there are none."""


class Watchdog:
    """Measures how long the same step has been under way.

    A gap between two checks counts as at most two check intervals: a stopped process or a suspended machine is not a
    hung step.
    """

    def __init__(self) -> None:
        self._step: StepUnderWay | None = None
        self._seen_at = 0.0
        self._age_s = 0.0

    def hangs(self, step: StepUnderWay | None, now: float) -> bool:
        """Return whether the step under way, if any, hangs.

        Args:
            step: the current step; the same object for as long as the step lasts.
            now: time.monotonic(), or the time of another monotonic clock.
        """
        if step is None or step is not self._step:
            self._step, self._age_s = step, 0.0
        else:
            self._age_s += min(now - self._seen_at, 2 * CHECK_INTERVAL_S)
        self._seen_at = now
        return step is not None and self._age_s > max(HANG_FLOOR_S, HANG_FACTOR * step.expected_s)
