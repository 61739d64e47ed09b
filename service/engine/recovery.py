"""What a step that raises costs whom: it is taken again in halves, until the images that make it raise stand alone.

Taking a step again is exact, because a runner writes nothing before all is computed and noise is a function of the
step: images that take it in a smaller batch, or a second time, get the pixels they would have had.
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
"""Steps without running out of memory before twice the rows are tried: should that fail, it costs less than 1 %."""

Attempt = Callable[[Sequence[Image]], list[bool]]
"""Takes a step of some images of a batch; says which are still finite."""


@dataclass
class Outcome:
    """What became of the images of a step."""

    ok: list[bool]
    """Of each image, whether it may go on."""
    failures: dict[Image, FailureKind] = field(default_factory=dict)
    """Images that made the step raise, each of them alone."""
    attempts: int = 1


def take_step(
    images: Sequence[Image],
    attempt: Attempt,
    runner: Runner,
    failed: Callable[[FailureKind, Sequence[Image]], None],
) -> Outcome:
    """Take a step, in halves where it raises; images that raise alone, twice, fail.

    That an image is guilty is believed only while the network runs without it: unless others have taken the step, the
    runner must pass a check of the network.

    Args:
        images: of one model, at least one.
        attempt: takes the step for any part of them.
        runner: says what an error means.
        failed: told of every attempt that raised.

    Raises:
        Exception: whatever was raised, where the device is not to be trusted any more; what that check raises, where
            the network does not run without these images either.
    """
    outcome = _halves(images, attempt, runner, failed)
    if len(outcome.failures) == len(images):
        runner.check_network()
    for image, kind in outcome.failures.items():
        log.error("image %d of request %s fails: %s", image.position, image.request_id, kind.value)
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
        again = _try(images, attempt, runner)  # a passing trouble must not cost anybody an image
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
    """Make one attempt. Its error ends here: kept, it would keep the memory of all that was being computed."""
    try:
        return attempt(images)
    except Exception as error:
        kind = runner.failure_kind(error)
        if kind is FailureKind.DEVICE:
            raise
        trace = "".join(format_exception(error))  # text: log handlers may keep what they are given
        log.warning("a step of %d images raised (%s)\n%s", len(images), kind.value, trace)
        return kind


class MemoryLimit:
    """The most rows of a step that memory has room for, as far as is known. Counted in steps; holds no clock."""

    def __init__(self, max_rows: int) -> None:
        self.rows = max_rows
        self._max_rows = max_rows
        self._steps = 0

    def ran_out(self, rows: int) -> None:
        """Take note that a step of so many rows, padding counted, ran out of memory."""
        self.rows = max(LEAST_WIDTH, min(self.rows, rows // 2))
        self._steps = 0

    def count_step(self) -> bool:
        """Take note of a step; says whether twice the rows are to be tried from now on."""
        if self.rows == self._max_rows:
            return False
        self._steps += 1
        if self._steps < STEPS_BEFORE_GROWING:
            return False
        self.rows = min(self._max_rows, 2 * self.rows)
        self._steps = 0
        return True
