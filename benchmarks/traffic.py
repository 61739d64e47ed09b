"""Traffic for a server: requests of 50, 100 or 250 steps and 1 to 4 images, at the times of a Poisson process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

MIX: Mapping[int, float] = {50: 0.5, 100: 0.3, 250: 0.2}
"""Probability of each number of steps."""
MAX_IMAGES = 4
"""A request has 1 to this many images, all equally likely."""
SLO = 10.0
"""A request is served well if it takes at most this multiple of its time alone."""


@dataclass(frozen=True)
class Arrival:
    """A request."""

    at: float
    """Time at which it is sent, independently of earlier requests."""
    steps: int
    rows: int
    """Images: no request uses guidance, so each takes one row of a network call."""

    @property
    def row_steps(self) -> int:
        """Work of the request."""
        return self.steps * self.rows


def mean_row_steps(mix: Mapping[int, float] = MIX) -> float:
    """Return the mean work of a request."""
    return sum(steps * part for steps, part in mix.items()) * (1 + MAX_IMAGES) / 2


def draw_arrival(draw: random.Random, before: float, rate: float, mix: Mapping[int, float] = MIX) -> Arrival:
    """Draw the next request of a Poisson process.

    Args:
        draw: random generator.
        before: arrival time of the previous request.
        rate: requests per unit of time.
        mix: probability of each number of steps.
    """
    at = before + draw.expovariate(rate)
    (steps,) = draw.choices(list(mix), list(mix.values()))
    return Arrival(at, steps, draw.randint(1, MAX_IMAGES))


def draw_arrivals(row_steps_per_s: float, seconds: float, seed: int, mix: Mapping[int, float] = MIX) -> list[Arrival]:
    """Draw the requests of a span of time that offer this amount of work; `at` is in seconds from its start."""
    draw = random.Random(seed)  # noqa: S311  # nothing secret
    rate = row_steps_per_s / mean_row_steps(mix)
    requests: list[Arrival] = []
    arrival = draw_arrival(draw, 0.0, rate, mix)
    while arrival.at < seconds:
        requests.append(arrival)
        arrival = draw_arrival(draw, arrival.at, rate, mix)
    return requests
