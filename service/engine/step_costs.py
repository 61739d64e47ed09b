"""StepCosts: how long a step takes, as measured, by the rows in it, and the width that makes the most of it."""

from __future__ import annotations

from bisect import bisect_left

SMOOTHING = 0.05
"""Weight of the newest step in the running mean of its batch size."""
SHARED = 0.95
"""Part, by ratio, of what a step gains or loses against that mean that is put down to the machine, and so to all sizes.

The more, the less a size that is not run keeps of how fast the machine was; the less, the sooner one that was measured
wrongly is put right.
"""


class StepCosts:
    """Seconds of an engine step: c(rows) of the network's call and all else, and g(classified) of the classifier's.

    g is what a step with a classifier call takes beyond one without, which is all that a clock outside the step can
    tell. Rows count with padding.
    """

    def __init__(self) -> None:
        self._network = _Curve(SHARED)
        self._classifier = _Curve(shared=0.0)  # a small difference of two large ones says nothing of the machine

    def observe(self, rows: int, seconds: float, classified: int = 0) -> None:
        """Take in a step of so many rows, of which the classifier was called on some.

        Raises:
            ValueError: no rows, or time running backwards.
        """
        if rows < 1 or seconds < 0:
            raise ValueError(f"a step has at least 1 row and takes at least 0 s; got {rows} rows, {seconds} s")
        if classified == 0:
            self._network.observe(rows, seconds)
        else:
            self._classifier.observe(classified, max(0.0, seconds - self._network.seconds(rows)))

    def seconds(self, rows: float, classified: float = 0) -> float:
        """Return what a step of so many rows takes; 0 before anything was measured."""
        return self._network.seconds(rows) + (self._classifier.seconds(classified) if classified else 0.0)

    def table(self) -> dict[int, float]:
        """Return the measured sizes of network calls and their pooled seconds."""
        return self._network.table()


class _Curve:
    """Seconds by padded rows, a running mean per batch size; holds no clock.

    A machine changes its speed, and a size that is not run for a while would keep what it took before: then the width
    would follow the weather. So a cost is what the size takes, times what all of them do. Every step moves both, and
    by fixed parts: how slow the machine is said to be cannot wander off while the sizes that are run keep their cost.

    More rows never take less time: where measurements say so, noise does, and they are pooled. Between two sizes the
    cost is interpolated; below the least it is the least; beyond the largest it grows by row like the largest.
    """

    def __init__(self, shared: float) -> None:
        self._shared = shared
        self._slowness = 1.0
        """Of the machine, as far as it has changed since the first step."""
        self._reference: dict[int, float] = {}
        """Seconds by size, at a slowness of 1."""
        self._curve: tuple[list[int], list[float]] | None = None  # forgotten when a measurement comes in

    def observe(self, rows: int, seconds: float) -> None:
        reference = self._reference.get(rows)
        if not reference:
            self._reference[rows] = seconds / self._slowness
        else:
            ratio = 1 + SMOOTHING * (seconds / (reference * self._slowness) - 1)
            self._slowness *= ratio**self._shared
            self._reference[rows] = reference * ratio ** (1 - self._shared)
        self._curve = None

    def seconds(self, rows: float) -> float:
        sizes, costs = self._monotone()
        if not sizes:
            return 0.0
        at = bisect_left(sizes, rows)
        if at == len(sizes):
            return costs[-1] * rows / sizes[-1]
        if at == 0 or sizes[at] == rows:
            return costs[at]
        part = (rows - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return costs[at - 1] + part * (costs[at] - costs[at - 1])

    def table(self) -> dict[int, float]:
        return dict(zip(*self._monotone(), strict=True))

    def _monotone(self) -> tuple[list[int], list[float]]:
        """Pool adjacent sizes whose costs fall: the nearest non-decreasing curve in the sense of least squares."""
        if self._curve is None:
            sizes = sorted(self._reference)
            pools: list[tuple[float, int]] = []  # mean, sizes in it
            for size in sizes:
                mean, count = self._reference[size] * self._slowness, 1
                while pools and pools[-1][0] > mean:
                    before, number = pools.pop()
                    mean = (mean * count + before * number) / (count + number)
                    count += number
                pools.append((mean, count))
            self._curve = (sizes, [mean for mean, count in pools for _ in range(count)])
        return self._curve


def knee(costs: StepCosts, max_rows: int, efficiency: float, least: int = 2) -> int:
    """Return the smallest measured width whose rows per second are within `efficiency` of the best one's.

    Beyond it a step takes longer for everybody in it and hardly more comes out.

    Args:
        costs: what steps take; `max_rows` while nothing that wide has been measured.
        max_rows: the widest allowed.
        efficiency: part of the best row rate that will do, in (0, 1].
        least: the narrowest allowed; an image with classifier-free guidance takes 2 rows.
    """
    table = costs.table()
    if max(table, default=0) < max_rows or not all(table.values()):
        return max_rows
    widths = sorted({rows for rows in table if least <= rows < max_rows} | {max_rows})
    rates = [rows / min(seconds for size, seconds in table.items() if size >= rows) for rows in widths]
    return next(rows for rows, rate in zip(widths, rates, strict=True) if rate >= efficiency * max(rates))
