"""Recover from a step that raises: repeat it in halves until the images that cause the error are isolated.

Repeating a step is exact: a runner writes nothing before everything is computed, and noise is a function of the step.
Images that repeat a step, or take it in a smaller batch, get bit-identical pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from traceback import format_exception

from service.backends.base import FailureKind
from service.engine.request import Image
from service.engine.runners.base import Runner

log = logging.getLogger(__name__)

LEAST_WIDTH = 2
"""An image with classifier-free guidance takes two rows."""
STEPS_BEFORE_GROWING = 256
"""Steps without running out of memory before doubling the rows; a failed attempt then costs less than 1 %."""

Attempt = Callable[[Sequence[Image]], list[bool]]
"""Takes a step of some images of a batch; returns which are still finite."""


@dataclass
class Outcome:
    """Outcome of a step for each of its images."""

    ok: list[bool]
    """For each image, whether it may continue."""
    failures: dict[Image, FailureKind] = field(default_factory=dict)
    """Images for which the step raised even when taken alone."""
    attempts: int = 1


def take_step(
    images: Sequence[Image],
    attempt: Attempt,
    runner: Runner,
    failed: Callable[[FailureKind, Sequence[Image]], None],
) -> Outcome:
    """Take a step, repeating it in halves if it raises. An image that raises alone, twice, fails.

    If every image fails, the runner must pass a check of the network, to rule out that the network itself is broken.

    Args:
        images: images of one model, at least one.
        attempt: takes the step for any part of them.
        runner: classifies errors and checks the network.
        failed: called after every attempt that raised.

    Raises:
        Exception: the original error if the device can no longer be trusted, or the error of the network check if the
            network does not run without these images either.
    """
    outcome = _halves(images, attempt, runner, failed)
    if len(outcome.failures) == len(images):
        runner.check_network()
    for image, kind in outcome.failures.items():
        log.error("image %d of request %s failed: %s", image.position, image.request_id, kind.value)
    return outcome


def _halves(
    images: Sequence[Image],
    attempt: Attempt,
    runner: Runner,
    failed: Callable[[FailureKind, Sequence[Image]], None],
) -> Outcome:
    result = _try(images, attempt, runner)
    if not isinstance(result, FailureKind):
        return Outcome(result)
    failed(result, images)
    if len(images) == 1:
        again = _try(images, attempt, runner)  # a transient error must not fail an image
        if not isinstance(again, FailureKind):
            return Outcome(again, attempts=2)
        failed(again, images)
        return Outcome([False], failures={images[0]: again}, attempts=2)
    middle = len(images) // 2
    first, second = (_halves(half, attempt, runner, failed) for half in (images[:middle], images[middle:]))
    return Outcome(
        first.ok + second.ok,
        failures=first.failures | second.failures,
        attempts=1 + first.attempts + second.attempts,
    )


def _try(images: Sequence[Image], attempt: Attempt, runner: Runner) -> list[bool] | FailureKind:
    """Make one attempt. Drop the error object: it would keep the memory of intermediate results alive."""
    try:
        return attempt(images)
    except Exception as error:
        kind = runner.failure_kind(error)
        if kind is FailureKind.DEVICE:
            raise
        trace = "".join(format_exception(error))  # as text: log handlers may keep references
        log.warning("a step of %d images raised (%s)\n%s", len(images), kind.value, trace)
        return kind


class MemoryLimit:
    """The largest number of rows per step known to fit in memory. Counts in steps; uses no clock."""

    def __init__(self, max_rows: int) -> None:
        self.rows = max_rows
        self._max_rows = max_rows
        self._steps = 0

    def ran_out(self, rows: int) -> None:
        """Record that a step of `rows` rows, including padding, ran out of memory."""
        self.rows = max(LEAST_WIDTH, min(self.rows, rows // 2))
        self._steps = 0

    def count_step(self) -> bool:
        """Count a step. Return whether the limit was raised: later steps may have twice the rows."""
        if self.rows == self._max_rows:
            return False
        self._steps += 1
        if self._steps < STEPS_BEFORE_GROWING:
            return False
        self.rows = min(self._max_rows, 2 * self.rows)
        self._steps = 0
        return True
