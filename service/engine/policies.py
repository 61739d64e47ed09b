"""Who is served next: a policy is a pure function from an image to a number, the least of which goes first.

All images age alike, so none of these depends on the present: the order of two images changes only when one of them
takes a step. Whoever sorts by them breaks ties by arrival.

How long an image can be overtaken within its priority, by images of clients that are within their share:

- fifo: by nobody who came later.
- srw: by nobody who came more than `remaining row-steps / ageing` steps of the model later.
- deadline: by nobody who came after its deadline (or `PATIENCE_S` after its arrival, where it has none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

from service.engine.request import Image

PolicyName = Literal["fifo", "srw", "deadline"]
Policy = Callable[[Image], float]
CHANGE_WITH_STEPS: frozenset[PolicyName] = frozenset({"srw"})
"""Policies that give an image another number after each of its steps; the others keep to the first one."""

PATIENCE_S = 60.0
"""Seconds after its arrival in which an image without a deadline is due, so that deadlines never starve it."""


def fifo(image: Image) -> float:
    """First come, first served."""
    return image.sequence


def srw(ageing: float) -> Policy:
    """Return aged shortest remaining work: `remaining - ageing * age`, less what is the same for all at any moment.

    Remaining work is in row-steps, age in steps of the model. Unaged, this is shortest remaining processing time,
    which has the least mean latency of all orders (Schrage 1968) and starves long images.
    """

    def aged_work(image: Image) -> float:
        return image.remaining_row_steps + ageing * image.arrival_step

    return aged_work


def deadline(image: Image) -> float:
    """Earliest deadline first."""
    return image.submitted_at + PATIENCE_S if image.deadline is None else image.deadline


def policy_named(name: PolicyName, ageing: float) -> Policy:
    """Return a policy; `ageing` matters to srw only."""
    match name:
        case "fifo":
            return fifo
        case "srw":
            return srw(ageing)
        case "deadline":
            return deadline
        case _:
            assert_never(name)
