"""StepCosts: the measured duration of a step by its rows, and the most efficient width."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

SMOOTHING = 0.05
"""Weight of the newest step in the running mean of the machine's slowness."""
COMPARING = 0.05
"""Weight of the newest comparison of two sizes in their relative costs."""
DOUBT = 2.0
"""Limit on the factor of one comparison: a single delayed step is weak evidence about its size."""
HELD_UP = 4.0
"""Limit on a step's duration relative to the expected one: a machine that was suspended is not slow."""
ESTABLISHED = 64
"""Number of steps after which the weight of a size no longer grows."""


@dataclass(frozen=True)
class Curve:
    """Seconds by padded rows, derived from the measured sizes.

    The curve is non-decreasing: measurements in which more rows take less time are treated as noise and pooled. Costs
    are interpolated between two sizes, constant below the smallest, and proportional to the rows beyond the largest.
    """

    sizes: tuple[int, ...] = ()
    """Ascending."""
    costs: tuple[float, ...] = ()
    """Seconds per step of each size; non-decreasing."""

    @classmethod
    def through(cls, measured: Mapping[int, float]) -> Curve:
        """Return the least-squares non-decreasing curve: pool adjacent sizes whose costs decrease."""
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
        """Return the seconds for `rows` rows; 0 before the first measurement."""
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
    """Immutable estimate of the seconds of an engine step."""

    network: Curve = Curve()
    """Seconds at a slowness of 1."""
    classifier: Curve = Curve()
    slowness: float = 1.0
    """Slowness of the machine, relative to the first step."""

    def seconds(self, rows: float, classified: float = 0) -> float:
        """Return the seconds of a step of `rows` rows; 0 before the first measurement."""
        network = self.slowness * self.network.seconds(rows)
        return network + (self.classifier.seconds(classified) if classified else 0.0)

    def table(self) -> dict[int, float]:
        """Return the measured sizes of network calls with their pooled seconds."""
        return {rows: self.slowness * cost for rows, cost in zip(self.network.sizes, self.network.costs, strict=True)}


class StepCosts:
    """Seconds of an engine step: g(classified) for the classifier call, c(rows) for the network call and the rest.

    The speed of a machine can change by a factor of two within minutes. A mean per size would therefore mostly reflect
    when that size last ran, and the width would follow this drift. Two quantities are estimated instead:

    - The slowness of the machine, common to all sizes, from every step without a classifier call.
    - The relative costs of sizes, when the batch size changes: the second step of the new size (the first may be less
      warmed up) is compared with the last step of the other size that was not a first one. The size with fewer steps
      gets the larger correction.

    g is the additional time of a step with a classifier call; a clock outside the step cannot measure more than that.
    Rows include padding.
    """

    def __init__(self) -> None:
        self.now = Costs()
        """The current estimate."""
        self._network: dict[int, float] = {}
        """Measured seconds by rows, at a slowness of 1."""
        self._classifier: dict[int, float] = {}
        self._last_rows: int | None = None
        """Rows of the previous step."""
        self._yardstick: tuple[int, float] | None = None
        """Rows and seconds of the last step whose predecessor had the same number of rows."""
        self._steps: Counter[int] = Counter()
        """Number of observed steps of each size, at most `ESTABLISHED`."""

    def observe(self, rows: int, seconds: float, classified: int = 0) -> None:
        """Record a step of `rows` rows with a classifier call on `classified` rows. A duration of 0 s is ignored.

        Raises:
            ValueError: `rows` is less than 1 or `seconds` is negative.
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
        """Return the seconds of a step of `rows` rows; 0 before the first measurement."""
        return self.now.seconds(rows, classified)

    def table(self) -> dict[int, float]:
        """Return the measured sizes of network calls with their pooled seconds."""
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
    """Return the smallest measured width whose row rate is at least `efficiency` times the best row rate.

    Greater widths lengthen the step of every image and hardly raise the throughput.

    Args:
        costs: measured step costs; the result is `max_rows` until that width has been measured.
        max_rows: greatest allowed width.
        efficiency: sufficient part of the best row rate, in (0, 1].
        least: smallest allowed width; an image with classifier-free guidance takes 2 rows.
    """
    table = costs.table()
    if max(table, default=0) < max_rows:
        return max_rows
    widths = sorted({rows for rows in table if least <= rows < max_rows} | {max_rows})
    rates = [rows / min(seconds for size, seconds in table.items() if size >= rows) for rows in widths]
    return next(rows for rows, rate in zip(widths, rates, strict=True) if rate >= efficiency * max(rates))
