"""Scheduling policies. A policy is a pure function from an image to a number; the image with the least is served first.

All images age at the same rate, so no policy depends on the current time: the order of two images changes only when
one of them takes a step. The caller breaks ties by arrival.

Limits on overtaking within a priority, by images of clients within their share:

- fifo: a later image never overtakes.
- srw: an image that arrives more than `remaining row-steps / ageing` model steps later does not overtake.
- deadline: an image that arrives after this one's deadline does not overtake. Without a deadline, `PATIENCE_S` after
  arrival counts as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

from service.engine.request import Image

PolicyName = Literal["fifo", "srw", "deadline"]
Policy = Callable[[Image], float]
CHANGE_WITH_STEPS: frozenset[PolicyName] = frozenset({"srw"})
"""Policies whose number changes after each step of an image; under the others it is constant."""

PATIENCE_S = 60.0
"""Seconds after arrival at which an image without a deadline is due, so that deadlines never starve it."""


def fifo(image: Image) -> float:
    """Return the arrival number: first come, first served."""
    return image.sequence


def srw(ageing: float) -> Policy:
    """Return aged shortest remaining work: `remaining - ageing * age`, without the term that all images share.

    Remaining work is in row-steps, age in steps of the model. Without ageing, this is shortest remaining processing
    time, which has the least mean latency of all orders (Schrage 1968) but starves long images.
    """

    def aged_work(image: Image) -> float:
        return image.remaining_row_steps + ageing * image.arrival_step

    return aged_work


def deadline(image: Image) -> float:
    """Return the deadline: earliest deadline first."""
    return image.submitted_at + PATIENCE_S if image.deadline is None else image.deadline


def policy_named(name: PolicyName, ageing: float) -> Policy:
    """Return a policy by name; only srw uses `ageing`."""
    match name:
        case "fifo":
            return fifo
        case "srw":
            return srw(ageing)
        case "deadline":
            return deadline
        case _:
            assert_never(name)
