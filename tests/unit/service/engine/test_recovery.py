"""Steps that raise: only the images that cause the error fail, and only if the network runs without them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.backends.base import FailureKind
from service.engine.recovery import STEPS_BEFORE_GROWING, MemoryLimit, Outcome, take_step
from service.engine.request import Image
from tests.fakes import CountingRunner, generation, params


class DeviceLost(Exception):
    """An error after which no step can be repeated."""


class CheckedRunner(CountingRunner):
    """A runner that classifies errors, and reports whether the network runs at all."""

    def __init__(self, runs: bool = True) -> None:
        super().__init__()
        self.checks = 0
        self._runs = runs

    def failure_kind(self, error: Exception) -> FailureKind:
        return FailureKind.DEVICE if isinstance(error, DeviceLost) else super().failure_kind(error)

    def check_network(self) -> None:
        self.checks += 1
        if not self._runs:
            raise RuntimeError("the network does not run")


def images_of(count: int) -> list[Image]:
    request = generation("r", *[params()] * count)
    return [Image(request=request, position=k, submitted_at=0.0) for k in range(count)]


class Steps:
    """Attempts that raise if there are more images than fit, or certain images among them."""

    def __init__(self, guilty: set[int], fits: int = 1000, error: type[Exception] = ValueError) -> None:
        self.attempts: list[list[int]] = []
        self.failures: list[FailureKind] = []
        self._guilty = guilty
        self._fits = fits
        self._error = error

    def attempt(self, images: Sequence[Image]) -> list[bool]:
        positions = [image.position for image in images]
        self.attempts.append(positions)
        if len(images) > self._fits:
            raise MemoryError
        if self._guilty & set(positions):
            raise self._error("bad row")
        return [True] * len(images)

    def failed(self, kind: FailureKind, images: Sequence[Image]) -> None:
        self.failures.append(kind)

    def take(self, images: list[Image], runner: CheckedRunner) -> Outcome:
        return take_step(images, self.attempt, runner, self.failed)


def test_a_step_that_does_not_raise_is_taken_once() -> None:
    steps, runner = Steps(set()), CheckedRunner()
    assert steps.take(images_of(5), runner).ok == [True] * 5
    assert (steps.attempts, runner.checks) == ([[0, 1, 2, 3, 4]], 0)


@given(st.integers(1, 12), st.sets(st.integers(0, 11)), st.integers(1, 12))
def test_exactly_the_images_that_cause_errors_fail_for_any_memory(count: int, guilty: set[int], fits: int) -> None:
    images, steps, runner = images_of(count), Steps(guilty, fits), CheckedRunner()
    outcome = steps.take(images, runner)
    assert outcome.ok == [position not in guilty for position in range(count)]
    assert outcome.failures == {image: FailureKind.ROWS for image in images if image.position in guilty}
    assert outcome.attempts == len(steps.attempts)
    succeeded = [positions for positions in steps.attempts if len(positions) <= fits and not guilty & set(positions)]
    assert sorted(position for positions in succeeded for position in positions) == sorted(set(range(count)) - guilty)
    assert runner.checks == (guilty >= set(range(count)))
    assert len(steps.failures) == len(steps.attempts) - len(succeeded)


def test_one_failing_image_among_many_takes_a_logarithmic_number_of_attempts() -> None:
    steps = Steps({5})
    steps.take(images_of(32), CheckedRunner())
    assert len(steps.attempts) == 1 + 2 * 5 + 1  # all; two halves, five times; the failing one once more


def test_an_image_that_does_not_fit_alone_fails_for_that_reason() -> None:
    (image,) = images_of(1)
    outcome = Steps(set(), fits=0).take([image], CheckedRunner())
    assert outcome.failures == {image: FailureKind.OUT_OF_MEMORY}


def test_a_temporary_error_fails_no_image() -> None:
    calls = 0

    def attempt(images: Sequence[Image]) -> list[bool]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("passing")
        return [True]

    outcome = take_step(images_of(1), attempt, CheckedRunner(), lambda *_: None)
    assert (outcome.ok, outcome.failures, outcome.attempts) == ([True], {}, 2)


def test_an_error_of_a_network_that_does_not_run_fails_no_image() -> None:
    runner = CheckedRunner(runs=False)
    with pytest.raises(RuntimeError, match="the network does not run"):
        Steps({0, 1, 2}).take(images_of(3), runner)


def test_a_device_error_is_not_retried() -> None:
    steps = Steps({1}, error=DeviceLost)
    with pytest.raises(DeviceLost):
        steps.take(images_of(4), CheckedRunner())
    assert len(steps.attempts) == 1


def test_arrays_of_a_failed_attempt_are_released_before_the_next() -> None:
    class Buffer:
        pass

    buffers: list[weakref.ref[Buffer]] = []

    def attempt(images: Sequence[Image]) -> list[bool]:
        assert [buffer() for buffer in buffers] == [None] * len(buffers)
        buffer = Buffer()
        buffers.append(weakref.ref(buffer))
        if len(images) > 1:
            raise MemoryError
        return [True]

    gc.disable()  # otherwise garbage collection might free it
    try:
        take_step(images_of(2), attempt, CheckedRunner(), lambda *_: None)
    finally:
        gc.enable()
    assert len(buffers) == 3


def test_running_out_of_memory_halves_the_width_which_recovers_by_doubling() -> None:
    limit = MemoryLimit(16)
    limit.ran_out(12)
    assert limit.rows == 6
    limit.ran_out(16)  # older than the current width
    assert limit.rows == 6
    grown = []
    while limit.rows < 16:
        grown.append([limit.count_step() for _ in range(STEPS_BEFORE_GROWING)].index(True))
        grown.append(limit.rows)
    assert grown == [STEPS_BEFORE_GROWING - 1, 12, STEPS_BEFORE_GROWING - 1, 16]
    assert not any(limit.count_step() for _ in range(2 * STEPS_BEFORE_GROWING))


def test_the_width_never_falls_below_what_one_guided_image_takes() -> None:
    limit = MemoryLimit(8)
    for rows in (8, 4, 2, 1):
        limit.ran_out(rows)
    assert limit.rows == 2
