"""Time contenders in turns, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SETTLE_BELOW_S = 0.2
"""A faster contender is called once untimed at each turn: spinning threads of the previous contender and
cold caches would be a noticeable part of the call."""
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Wall times of one contender's calls, in seconds."""

    seconds: tuple[float, ...]
    """In the order they were taken, at least one."""

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the calls were shorter than the first, a quarter longer than the second."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long to measure."""

    rounds: int
    """Rounds, if there is time."""
    max_seconds: float
    """No round starts after these seconds, once there are `MIN_ROUNDS` (or all `rounds`, if these are fewer)."""
    warm_up_calls: int = 2
    pause: float = 0.01
    """Seconds before each turn, in which the previous contender's threads go to sleep."""


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    pace: Pace,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Warm every contender up, then time rounds of one call of each.

    Each round starts with another contender, so that none always follows the same one.

    Args:
        contenders: by name; a call returns when its work is done.
        pace: how long.
        clock: seconds.
        sleep: waits for seconds.

    Returns:
        The timings by name, all of the same length.
    """
    names = list(contenders)
    settles = dict.fromkeys(names, False)
    for name, call in contenders.items():
        for _ in range(pace.warm_up_calls):
            begun = clock()
            call()
            settles[name] = clock() - begun < SETTLE_BELOW_S

    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    gc.collect()
    gc.disable()
    try:
        for number in range(pace.rounds):
            if number >= MIN_ROUNDS and clock() - started > pace.max_seconds:
                break
            first = number % len(names) if names else 0
            for name in names[first:] + names[:first]:
                sleep(pace.pause)
                if settles[name]:
                    contenders[name]()
                begun = clock()
                contenders[name]()
                seconds[name].append(clock() - begun)
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
