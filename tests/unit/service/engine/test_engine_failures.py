"""Under all failures, arrivals and cancellations, no pixel differs, no row leaks, and every image ends exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.network_inputs import NetworkInputs
from service.backends.base import FailureKind
from service.backends.pending import Later, Pending, Raised
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.policies import PolicyName
from service.engine.recovery import STEPS_BEFORE_GROWING
from service.engine.request import ImageParams, ImageResult, ImageStatus, PlanKey, Priority
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from tests.counts import count
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import CountingRunner, generation, params, tiny_config
from tests.given_images import output_of, sampled_alone, with_any_chain
from tests.late_queue import LateQueue

WIDTH = 4
CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=1)
FINE, OVERFLOWS, RAISES = 1, 2, 3
"""Classes of images, by the effect on the network in the second half of the chain."""
Kind = Literal["any size", "compiled sizes", "asynchronous", "queued"]


class DeviceLost(Exception):
    """An error of the device."""


class FaultyDenoiser(ExactDenoiser):
    """A network that overflows on some rows, raises on others, runs out of memory, and has temporary errors."""

    def __init__(self, batch_sizes: tuple[int, ...] | None, xp: Any = np) -> None:
        super().__init__(tiny_config(), xp, batch_sizes)
        self.armed = False
        self.most_rows = 1000
        self.next_error: Exception | None = None

    def failure_kind(self, error: Exception) -> FailureKind:
        return FailureKind.DEVICE if isinstance(error, DeviceLost) else super().failure_kind(error)

    def embed_timesteps(self, t_model: Any) -> Any:
        self._have_trouble()
        return super().embed_timesteps(t_model)

    def _have_trouble(self) -> None:
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            raise error.with_traceback(None)  # otherwise it keeps the frames of all scripts

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        if not self.armed:
            return super().__call__(inputs)
        self._have_trouble()
        if len(inputs.x_t) > self.most_rows:
            raise MemoryError
        late = inputs.emb_t[:, 1] < 1.5  # t below 500
        if bool((late & (inputs.y == RAISES)).any()):
            raise ValueError("this row cannot be computed")
        out = super().__call__(inputs)
        out[late & (inputs.y == OVERFLOWS)] = np.inf
        return out


class AsynchronousFaulty(FaultyDenoiser):
    """Raises in turns when a call begins and when its result is fetched."""

    def begin(self, inputs: NetworkInputs[Any]) -> Pending[Any]:
        try:
            out = self(inputs)
        except Exception as error:
            if len(self.calls) % 2:
                raise
            return Raised(error)
        return Later(lambda: out)


class QueuedFaulty(FaultyDenoiser):
    """Raises when a step is launched; that a row has overflowed is known later.

    No step has a graph: replaying one calls no network that could raise.
    """

    def __init__(self, batch_sizes: tuple[int, ...] | None) -> None:
        super().__init__(batch_sizes, torch)
        self.queue: LateQueue = LateQueue(lambda inputs: self(inputs), None)
        self.queue.lacks_memory_after = 0


@cache
def faulty(kind: Kind) -> tuple[FaultyDenoiser, ArrayRunner[Any]]:
    """Return a network that fails, and a warmed-up runner of it."""
    kinds = {"asynchronous": AsynchronousFaulty, "queued": QueuedFaulty}
    denoiser = kinds.get(kind, FaultyDenoiser)((1, WIDTH, 2 * WIDTH) if kind in ("compiled sizes", "queued") else None)
    runner: ArrayRunner[Any] = ArrayRunner(denoiser, CONFIG)
    runner.warm_up()
    return denoiser, runner


@cache
def reference(image: ImageParams, xp: Any = np) -> bytes:
    """Sample one image alone, with a network that does not fail."""
    return sampled_alone(image, AsNetwork(ExactDenoiser(tiny_config(), xp)), xp=xp)


@st.composite
def image_params(draw: st.DrawFn) -> ImageParams:
    steps = draw(st.sampled_from([2, 3, 12]))
    sampler: str = draw(st.sampled_from(["ancestral", "ddim"]))
    return ImageParams(
        plan=PlanKey(sampler=sampler, spec=str(steps)),
        num_steps=steps,
        seed=draw(st.sampled_from([0, 7])),
        image_index=draw(st.integers(0, 2)),
        class_index=draw(st.sampled_from([0, FINE, FINE, OVERFLOWS, RAISES])),
        cfg_scale=draw(st.sampled_from([1.0, 1.0, 2.5])),
    )


Request = tuple[list[ImageParams], Priority, str, float | None]
REQUESTS: st.SearchStrategy[Request] = st.tuples(
    st.lists(with_any_chain(image_params()), min_size=1, max_size=4),
    st.sampled_from(Priority),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from([None, 5.0, 50.0]),
)
SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("add and step"), REQUESTS),
        st.tuples(st.just("add and step"), REQUESTS),
        st.tuples(st.just("add"), REQUESTS),
        st.tuples(st.just("abort"), st.integers(0, 6)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("memory"), st.sampled_from([1, 2, 3, 1000])),
        st.tuples(st.just("trouble"), st.sampled_from([RuntimeError("passing"), MemoryError()])),
    ),
    min_size=4,
    max_size=20,
)


def check_nothing_is_left(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_evicted) == (0, 0, 0)
    assert scheduler.remaining_row_steps == 0
    assert engine.num_saved == 0
    assert engine.under_way is None
    assert engine.report() == []
    for model in engine.runners:
        assert scheduler.free_slots(model) == list(range(CONFIG.num_slots))


@pytest.mark.parametrize("kind", get_args(Kind))
@settings(max_examples=count(2000, 20))
@given(script=SCRIPTS, policy=st.sampled_from(get_args(PolicyName)))
def test_no_pixel_differs_no_row_leaks_and_every_image_ends_once(
    kind: Kind, script: list[tuple[str, Any]], policy: PolicyName
) -> None:
    denoiser, runner = faulty(kind)
    denoiser.armed, denoiser.most_rows, denoiser.next_error = True, 1000, None
    least_memory = 1000
    metrics = Metrics()
    engine = Engine({"m": runner}, CONFIG.replace(policy=policy), metrics, clock=lambda: 0.0)
    requests: list[list[ImageParams]] = []
    results: list[ImageResult] = []
    for action, argument in script:
        if action in ("add", "add and step"):
            images, priority, client, deadline_s = argument
            request_id = str(len(requests))
            requests.append(images)
            engine.add(generation(request_id, *images, priority=priority, client=client, deadline_s=deadline_s), 0.0)
        elif action == "abort":
            results += engine.abort(str(argument))
        elif action == "memory":
            denoiser.most_rows = argument
            least_memory = min(least_memory, argument)
        elif action == "trouble":
            denoiser.next_error = argument
        if action == "add and step":
            results += engine.step()
        elif action == "step":
            for _ in range(argument):
                results += engine.step()
    while engine.has_work():
        results += engine.step()

    ends = [(result.request_id, result.position) for result in results]
    assert sorted(ends) == sorted((str(r), k) for r, images in enumerate(requests) for k in range(len(images)))
    for result in results:
        image = requests[int(result.request_id)][result.position]
        may_not_fit = runner.padded_rows(image.rows) > least_memory
        if result.status is ImageStatus.DONE:
            assert image.class_index in (0, FINE) or image.plan.kind == "denoise"  # whose call is early
            assert output_of(result) == reference(image, denoiser.xp)
        elif result.failure == "not_finite":
            assert image.class_index == OVERFLOWS
        elif result.failure == "error":
            assert image.class_index == RAISES
        elif result.failure == "out_of_memory":
            assert may_not_fit
        else:
            assert result.status is ImageStatus.ABORTED
    failed = [result for result in results if result.status is ImageStatus.FAILED]
    value = metrics.registry.get_sample_value
    reasons = ("not_finite", "error", "out_of_memory")
    counted = [value("iddpm_images_failed_total", {"reason": reason}) for reason in reasons]
    assert counted == [sum(result.failure == reason for result in failed) for reason in reasons]
    check_nothing_is_left(engine)


def test_the_scripts_do_evict_fail_and_retry() -> None:
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
