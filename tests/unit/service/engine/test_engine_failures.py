"""Failures that are made by hand: they are counted, retried, and end what they must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest

from service.backends.base import FailureKind
from service.engine.engine import Engine
from service.engine.recovery import STEPS_BEFORE_GROWING
from service.engine.request import ImageParams
from service.metrics import Metrics
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import CountingRunner, generation, params, tiny_config
from tests.faulty import FAULTY_CONFIG as CONFIG
from tests.faulty import FINE, OVERFLOWS, RAISES, WIDTH, DeviceLost, faulty
from tests.given_images import sampled_alone


@cache
def reference(image: ImageParams) -> bytes:
    """Sample one image alone, with a network that does not fail."""
    return sampled_alone(image, AsNetwork(ExactDenoiser(tiny_config())))


def test_evicted_images_and_failures_are_retried_and_counted() -> None:
    """Run one script by hand, to show that evictions, failures and retries happen."""
    denoiser, runner = faulty("any size")
    denoiser.armed, denoiser.most_rows, denoiser.next_error = True, 3, None
    metrics = Metrics()
    engine = Engine({"m": runner}, CONFIG, metrics, clock=lambda: 0.0)
    long = [_image(9, class_index) for class_index in (FINE, OVERFLOWS, RAISES, FINE)]
    engine.add(generation("long", *long), 0.0)
    results = engine.step()
    engine.add(generation("short", *[_image(2, FINE)] * 4), 0.0)
    denoiser.most_rows = 1000
    while engine.has_work():
        results += engine.step()
    outcomes = {(result.request_id, result.position): result.failure for result in results}
    assert [outcomes["long", k] for k in range(4)] == [None, "not_finite", "error", None]
    value = metrics.registry.get_sample_value
    assert value("iddpm_evictions_total") == 2  # the width is 2 after running out of memory
    assert value("iddpm_failed_attempts_total", {"kind": "out_of_memory"}) == 1
    # With its neighbour, alone, and alone again
    assert value("iddpm_failed_attempts_total", {"kind": "error"}) == 3
    for result in results:
        if result.pixels is not None:
            assert result.pixels.tobytes() == reference(
                (long if result.request_id == "long" else [_image(2, FINE)] * 4)[result.position]
            )


def _image(steps: int, class_index: int) -> ImageParams:
    return replace(params(steps=steps, seed=steps), class_index=class_index)


def test_out_of_memory_halves_the_width_for_a_while_and_fails_no_image() -> None:
    denoiser, runner = faulty("any size")
    denoiser.armed, denoiser.most_rows, denoiser.next_error = True, 3, None
    metrics = Metrics()
    engine = Engine({"m": runner}, CONFIG, metrics, clock=lambda: 0.0)
    engine.add(generation("r", *[_image(5, FINE)] * 4), 0.0)
    denoiser.calls.clear()
    results = engine.step()
    assert denoiser.calls == [2, 2]  # the same step, in halves
    assert engine.scheduler.width("m") == 2
    denoiser.most_rows = 1000
    while engine.has_work():
        results += engine.step()
    assert [result.pixels is not None and result.pixels.tobytes() for result in results] == [
        reference(_image(5, FINE))
    ] * 4
    while engine.scheduler.steps("m") < STEPS_BEFORE_GROWING:
        assert engine.scheduler.width("m") == 2
        if not engine.has_work():
            engine.add(generation("more", _image(9, FINE)), 0.0)
        engine.step()
    assert engine.scheduler.width("m") == WIDTH
    assert metrics.registry.get_sample_value("iddpm_width_rows", {"model": "m"}) == WIDTH


@pytest.mark.parametrize("error", [DeviceLost("gone"), KeyboardInterrupt()])
def test_errors_that_no_image_causes_end_the_engine(error: BaseException) -> None:
    class Lost(CountingRunner):
        def failure_kind(self, error: Exception) -> FailureKind:
            return FailureKind.DEVICE

        def step(self, slots: Sequence[int]) -> list[bool]:
            self.calls.append(list(slots))
            raise error.with_traceback(None)  # otherwise it keeps the frames of all scripts

    runner = Lost()
    engine = Engine({"m": runner}, CONFIG, Metrics())
    engine.add(generation("r", params(), params()), 0.0)
    with pytest.raises(type(error)):
        engine.step()
    assert len(runner.calls) == 1
    assert engine.under_way is None


def test_a_network_that_fails_for_every_image_ends_the_engine() -> None:
    engine = Engine({"m": CountingRunner(error_at=1)}, CONFIG, Metrics())
    engine.add(generation("r", params(), params()), 0.0)
    engine.step()
    with pytest.raises(RuntimeError, match="still on fire"):
        engine.step()


def test_only_steps_taken_in_one_attempt_count_as_step_costs() -> None:
    denoiser, runner = faulty("any size")
    denoiser.armed, denoiser.most_rows, denoiser.next_error = True, 1000, None
    ticks = iter(range(100))
    engine = Engine({"m": runner}, CONFIG, Metrics(), clock=lambda: float(next(ticks)))
    engine.add(generation("r", _image(5, FINE)), 0.0)
    denoiser.next_error = RuntimeError("passing")
    engine.step()
    assert engine.costs["m"].table() == {}
    engine.step()
    assert engine.costs["m"].table() == {1: 1.0}
