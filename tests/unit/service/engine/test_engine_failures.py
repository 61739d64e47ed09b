"""Failures that are made by hand: they are counted, retried, and end what they must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import get_args

import pytest

from service.backends.base import FailureKind
from service.engine.engine import Engine
from service.engine.recovery import STEPS_BEFORE_GROWING
from service.engine.request import ImageParams, ImageStatus, Priority
from service.metrics import Metrics
from service.requests.cascading import next_stage
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import CountingRunner, generation, params, tiny_config
from tests.faulty import FAULTY_CONFIG as CONFIG
from tests.faulty import FINE, MODELS, OVERFLOWS, RAISES, WIDTH, DeviceLost, Kind, faulty
from tests.given_images import sampled_alone, with_chain
from tests.unit.service.engine.test_random_scripts import LARGE, UPSAMPLER, Play, check_result, conditioned

RETURNS_ITS_IMAGE, ENCODE, RAW = 5, 10, 11
"""Numbers of chains of `tests.given_images`; 6 to 8 keep pixels, 8 with jumps."""


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


@pytest.mark.parametrize("kind", get_args(Kind))
def test_images_of_every_kind_are_evicted_halved_and_retried_without_a_changed_byte(kind: Kind) -> None:
    """Kept pixels, encodes, raw calls, conditioning and both stages of a cascade, each amid failures."""

    def of_kinds(seed: int, *numbers: int) -> list[ImageParams]:
        return [with_chain(_image(seed + k, FINE), number, k % 2) for k, number in enumerate(numbers)]

    masked, short = (6, 7, 8, 8), (RAW, ENCODE, RETURNS_ITS_IMAGE)
    play = Play(kind, "srw")
    play.act("add and step", generation("", *of_kinds(3, *masked), priority=Priority.BATCH))
    play.act("memory", ("m", 3))
    play.act("step", 1)  # four rows: in halves
    play.act("trouble", ("m", RuntimeError("passing")))
    play.act("add and step", generation("", *of_kinds(0, *short, *short)))  # instead of the longer ones
    play.act("memory", ("m", LARGE))
    conds = [conditioned(image, k % 2) for k, image in enumerate(of_kinds(5, *masked, *short))]
    play.act("add", generation("", *conds, model="up"))
    later = next_stage(MODELS["m"], UPSAMPLER, tuple([_image(6, FINE)] * 2))
    cascade = generation("", *of_kinds(7, 8, 6))
    play.act("add", replace(cascade, then=replace(later, model="up")))
    for trouble in (MemoryError(), RuntimeError("passing"), MemoryError(), RuntimeError("passing")):
        for model in MODELS:
            play.act("trouble", (model, trouble))
        play.act("step", 3)
    play.act("memory", ("up", 1))
    play.finish()
    assert Counter(result.status for result in play.results) == {ImageStatus.DONE: 4 + 6 + 7 + 2}
    for result in play.results:
        check_result(play, result)
    value = play.metrics.registry.get_sample_value
    assert (value("iddpm_evictions_total") or 0) > 0
    for reason in ("out_of_memory", "error"):
        assert (value("iddpm_failed_attempts_total", {"kind": reason}) or 0) > 1


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
