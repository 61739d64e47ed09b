"""StepCosts: how long a step takes, as measured, by the rows in it, and the width that makes the most of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

SMOOTHING = 0.05
"""Weight of the newest step in the running mean of how slow the machine is."""
COMPARING = 0.05
"""Weight of the newest comparison of two sizes in what they cost relative to each other."""
DOUBT = 2.0
"""A comparison counts as at most this factor: one step that was held up says little about its size."""
HELD_UP = 4.0
"""A step counts as at most so many times what it should take: a machine that stood still is not one that is slow."""
ESTABLISHED = 64
"""Steps after which a size is as well known as any."""


@dataclass(frozen=True)
class Curve:
    """Seconds by padded rows, from those of some sizes.

    More rows never take less time: where measurements say so, noise does, and they are pooled. Between two sizes the
    cost is interpolated; below the least it is the least; beyond the largest it grows by row like the largest.
    """

    sizes: tuple[int, ...] = ()
    """Ascending."""
    costs: tuple[float, ...] = ()
    """Seconds of each size; non-decreasing."""

    @classmethod
    def through(cls, measured: Mapping[int, float]) -> Curve:
        """Pool adjacent sizes whose costs fall: the nearest non-decreasing curve in the sense of least squares."""
        sizes = sorted(measured)
        pools: list[tuple[float, int]] = []  # mean, sizes in it
        for size in sizes:
            mean, count = measured[size], 1
            while pools and pools[-1][0] > mean:
                before, number = pools.pop()
                mean = (mean * count + before * number) / (count + number)
                count += number
            pools.append((mean, count))
        return cls(tuple(sizes), tuple(mean for mean, count in pools for _ in range(count)))

    def seconds(self, rows: float) -> float:
        """Return what so many rows take; 0 before anything was measured."""
        sizes, costs = self.sizes, self.costs
        if not sizes:
            return 0.0
        at = bisect_left(sizes, rows)
        if at == len(sizes):
            return costs[-1] * rows / sizes[-1]
        if at == 0 or sizes[at] == rows:
            return costs[at]
        part = (rows - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return costs[at - 1] + part * (costs[at] - costs[at - 1])


@dataclass(frozen=True)
class Costs:
    """Seconds of an engine step as known at one moment."""

    network: Curve = Curve()
    """At a slowness of 1."""
    classifier: Curve = Curve()
    slowness: float = 1.0
    """Of the machine, as far as it has changed since the first step."""

    def seconds(self, rows: float, classified: float = 0) -> float:
        """Return what a step of so many rows takes; 0 before anything was measured."""
        network = self.slowness * self.network.seconds(rows)
        return network + (self.classifier.seconds(classified) if classified else 0.0)

    def table(self) -> dict[int, float]:
        """Return the measured sizes of network calls and their pooled seconds."""
        return {rows: self.slowness * cost for rows, cost in zip(self.network.sizes, self.network.costs, strict=True)}


class StepCosts:
    """Seconds of an engine step: c(rows) of the network's call and all else, and g(classified) of the classifier's.

    A machine changes its speed, by a factor of two within minutes. So a mean per size would tell when the size was last
    run, and the width would follow the weather. How slow the machine is, which all sizes share, is learnt from every
    step without a classifier call. What sizes cost relative to each other is learnt where one takes over from another:
    the second step of the one, as the first may be colder, is compared with the last of the other that was not a first.
    The size that was run less often is the one to be put right.

    g is what a step with a classifier call takes beyond one without, which is all that a clock outside the step can
    tell. Rows count with padding.
    """

    def __init__(self) -> None:
        self.now = Costs()
        """What is known now."""
        self._network: dict[int, float] = {}
        """Measured seconds by rows, at a slowness of 1."""
        self._classifier: dict[int, float] = {}
        self._last_rows: int | None = None
        """Of the step before."""
        self._yardstick: tuple[int, float] | None = None
        """Rows and seconds of the last step whose predecessor had as many rows."""
        self._steps: Counter[int] = Counter()
        """Steps seen of each size, up to `ESTABLISHED`."""

    def observe(self, rows: int, seconds: float, classified: int = 0) -> None:
        """Take in a step of so many rows, of which the classifier was called on some; 0 s says nothing.

        Raises:
            ValueError: no rows, or time running backwards.
        """
        if rows < 1 or seconds < 0:
            raise ValueError(f"a step has at least 1 row and takes at least 0 s; got {rows} rows, {seconds} s")
        if seconds == 0:
            return
        if classified == 0:
            self._observe_network(rows, seconds)
            return
        beyond = max(0.0, seconds - self.seconds(rows))
        mean = self._classifier.get(classified, beyond)
        self._classifier[classified] = mean + SMOOTHING * (beyond - mean)
        self.now = replace(self.now, classifier=Curve.through(self._classifier))

    def seconds(self, rows: float, classified: float = 0) -> float:
        """Return what a step of so many rows takes; 0 before anything was measured."""
        return self.now.seconds(rows, classified)

    def table(self) -> dict[int, float]:
        """Return the measured sizes of network calls and their pooled seconds."""
        return self.now.table()

    def _observe_network(self, rows: int, seconds: float) -> None:
        costs, slowness = self._network, self.now.slowness
        is_first, self._last_rows = rows != self._last_rows, rows
        self._steps[rows] = min(self._steps[rows] + 1, ESTABLISHED)
        if rows not in costs:
            self._change({rows: seconds / slowness})
            return
        slower = min(seconds / (costs[rows] * slowness), HELD_UP)
        self.now = replace(self.now, slowness=slowness * (1 + SMOOTHING * (slower - 1)))
        if is_first:
            return
        if self._yardstick is not None and self._yardstick[0] != rows:
            self._compare(rows, seconds, *self._yardstick)
        self._yardstick = (rows, seconds)

    def _compare(self, rows: int, seconds: float, other: int, took: float) -> None:
        costs = self._network
        surprise = (seconds / took) / (costs[rows] / costs[other])
        step = COMPARING * math.log(min(max(surprise, 1 / DOUBT), DOUBT))
        share = self._steps[other] / (self._steps[rows] + self._steps[other])
        self._change({rows: costs[rows] * math.exp(step * share), other: costs[other] * math.exp(step * (share - 1))})

    def _change(self, measured: Mapping[int, float]) -> None:
        self._network.update(measured)
        self.now = replace(self.now, network=Curve.through(self._network))


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
    if max(table, default=0) < max_rows:
        return max_rows
    widths = sorted({rows for rows in table if least <= rows < max_rows} | {max_rows})
    rates = [rows / min(seconds for size, seconds in table.items() if size >= rows) for rows in widths]
    return next(rows for rows, rate in zip(widths, rates, strict=True) if rate >= efficiency * max(rates))
