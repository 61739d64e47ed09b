"""Steps on a device with a queue: results that arrive late change no pixel, and an error fails no other image."""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.arrays import namespace
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.backends.cuda_queue import compiled
from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.mailbox import Mailbox
from service.engine.request import ImageParams, ImageProgress, ImageResult, ImageStatus, Watch
from service.engine.runners.array_runner import ArrayRunner
from service.engine.runners.step import add_noise_and_advance
from service.engine.runners.steps import StepIncomplete
from service.engine.thread import (
    Abort,
    Command,
    EngineThread,
    Enter,
    ImagesEnded,
    Report,
    Stop,
    Stopped,
    Warm,
)
from service.errors import EngineDead, ModelError
from service.metrics import Metrics
from tests.denoisers import AsNetwork, ExactClassifier, ExactDenoiser
from tests.fakes import generation, params, tiny_classifier_config, tiny_config
from tests.given_images import output_of, sampled_alone, with_chain
from tests.late_queue import LateQueue, QueuedDenoiser
from tests.waiting import eventually, run_async, runs

WIDTH = 4
SIZES = (1, 2, WIDTH)
CONFIG = EngineConfig(max_rows=WIDTH, slots_per_row=2, timed_calls=0)
FIRST_SLOT = CONFIG.num_slots - 1


def denoiser(**changes: Any) -> QueuedDenoiser:
    guide = ExactClassifier(tiny_classifier_config(), torch, batch_sizes=SIZES)
    return QueuedDenoiser(tiny_config(), batch_sizes=SIZES, classifier=guide, **changes)


def warm(network: QueuedDenoiser, config: EngineConfig = CONFIG) -> ArrayRunner[Tensor]:
    runner = ArrayRunner(network, config)
    runner.warm_up()
    return runner


def reference(image: ImageParams) -> bytes:
    plan = build_plan(tiny_config().diffusion, image.plan.sampler, image.plan.spec, image.plan.eta)
    spec = ImageSpec(seed=image.seed, image_index=image.image_index, class_index=image.class_index)
    return sample_images(AsNetwork(denoiser()), plan, [spec], xp=torch)[0].tobytes()


def finish(engine: Engine) -> list[ImageResult]:
    results: list[ImageResult] = []
    while engine.has_work():
        results += engine.step()
    return results


def test_the_host_waits_for_a_step_after_launching_two_more() -> None:
    network = denoiser()
    engine = Engine({"m": warm(network)}, CONFIG, Metrics())
    network.queue.waits = 0
    engine.add(generation("r", params(steps=6)), submitted_at=0.0)
    waits = []
    while engine.has_work():
        engine.step()
        waits.append(network.queue.waits)
    assert waits == [0, 0, 1, 2, 3, 4, 5, 7]  # the last one also for the pixels


def test_a_failure_known_after_the_last_step_fails_the_image_and_not_its_neighbour() -> None:
    metrics = Metrics()
    runner = warm(denoiser())
    engine = Engine({"m": runner}, CONFIG, metrics)
    bad, good = params(steps=3, seed=1), params(steps=3, seed=2)
    engine.add(generation("r", bad, good, watch=Watch(preview_every=1)), submitted_at=0.0)
    engine.step()
    runner.slots.x[FIRST_SLOT] = torch.nan
    engine.step()
    engine.launch()  # the last step, as far as the host knows
    assert engine.scheduler.in_flight() == []
    failed, done = finish(engine)
    assert (failed.position, failed.status, failed.failure, failed.pixels) == (
        0,
        ImageStatus.FAILED,
        "not_finite",
        None,
    )
    assert done.pixels is not None
    assert done.pixels.tobytes() == reference(good)
    value = metrics.registry.get_sample_value
    assert value("iddpm_images_failed_total", {"reason": "not_finite"}) == 1
    assert value("iddpm_wasted_row_steps_total") == 3
    assert value("iddpm_row_steps_total") == 6
    assert value("iddpm_remaining_row_steps") == value("iddpm_images_running") == 0


def test_an_image_that_failed_during_its_eviction_leaves_nothing_in_host_memory() -> None:
    config = CONFIG.replace(slots_per_row=1)
    runner = warm(denoiser(), config)
    engine = Engine({"m": runner}, config, Metrics())
    engine.add(generation("long", *[params(steps=12, seed=k) for k in range(4)]), submitted_at=0.0)
    engine.step()
    runner.slots.x[:] = torch.nan
    engine.launch()  # NaN, which the host does not know yet
    engine.add(generation("short", *[params(steps=2, seed=9)] * 4), submitted_at=0.0)
    engine.launch()
    assert engine.num_saved == 4
    results = finish(engine)
    assert engine.num_saved == 0
    assert {r.request_id: r.failure for r in results} == {"long": "not_finite", "short": None}


def test_of_steps_that_settle_together_only_the_first_is_a_step_cost() -> None:
    now = itertools.count()
    engine = Engine({"m": warm(denoiser())}, CONFIG, Metrics(), clock=lambda: float(next(now) ** 2))
    engine.add(generation("r", params(steps=3)), submitted_at=0.0)
    engine.launch()
    engine.launch()
    engine.settle_all()
    engine.report()
    assert engine.costs["m"].table() == {1: 4.0}  # launched at 0, settled at 4; the next at 9


def test_images_aborted_during_a_step_end_once_and_leave_no_row() -> None:
    engine = Engine({"m": warm(denoiser())}, CONFIG, Metrics())
    engine.add(generation("a", params(steps=9), params(steps=2)), submitted_at=0.0)
    engine.add(generation("b", params(steps=4, seed=5)), submitted_at=0.0)
    engine.launch()
    engine.launch()  # the second image of `a` has taken its last step
    results = engine.abort("a")
    assert [(r.position, r.status) for r in results] == [(0, ImageStatus.ABORTED)]
    results = finish(engine)
    assert [(r.request_id, r.position, r.status) for r in results] == [
        ("a", 1, ImageStatus.DONE),
        ("b", 0, ImageStatus.DONE),
    ]
    assert engine.scheduler.free_slots("m") == list(range(CONFIG.num_slots))


@runs
async def test_a_stopped_engine_has_no_step_of_an_aborted_image_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, reports = ArrayRunner(denoiser(), CONFIG), list[Report]()
    engine, commands = Engine({"m": runner}, CONFIG, Metrics()), queue.SimpleQueue[Command]()
    launch = engine.launch

    def launch_then_stop() -> None:
        launch()
        commands.put(Abort("r"))
        commands.put(Stop())

    monkeypatch.setattr(engine, "launch", launch_then_stop)
    commands.put(Enter(engine.scheduler.order.images_of(generation("r", params(steps=9)), 0.0, {"m": 0})))
    thread = EngineThread(engine, commands, Mailbox(), asyncio.get_running_loop(), reports.append)
    await asyncio.to_thread(thread.run)
    await eventually(lambda: Stopped() in reports)
    assert [type(report) for report in reports] == [Warm, ImagesEnded, Stopped]
    assert not engine.has_work()
    again, image = Engine({"m": runner}, CONFIG, Metrics()), params(steps=4, seed=3)
    again.add(generation("r", image), submitted_at=0.0)
    [result] = finish(again)
    assert result.pixels is not None
    assert result.pixels.tobytes() == reference(image)


def test_an_error_raised_when_a_step_settles_is_a_device_error() -> None:
    network = denoiser()
    engine = Engine({"m": warm(network)}, CONFIG, Metrics())
    engine.add(generation("r", params(), params()), submitted_at=0.0)
    engine.step()
    network.queue.error = RuntimeError("an illegal memory access was encountered")
    engine.step()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()
    assert engine.under_way is None


@pytest.mark.parametrize("raises_at", ["receive", "where"])
def test_a_step_that_runs_out_of_memory_has_advanced_no_image_and_is_repeated_once(
    raises_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = denoiser()
    network.queue.lacks_memory_after = 0  # graphs allocate nothing
    engine = Engine({"m": warm(network)}, CONFIG, Metrics())
    image = params(steps=6)
    engine.add(generation("r", image), submitted_at=0.0)
    engine.step()
    owner: Any = network.queue if raises_at == "receive" else namespace(torch.zeros(1))
    for lacking in range(1, 5):  # the index of the call within a step
        real, calls = getattr(owner, raises_at), itertools.count(1)

        def lacks(*arguments: Any, real: Any = real, calls: Any = calls, lacking: int = lacking) -> Any:
            if next(calls) == lacking:
                raise MemoryError
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(owner, raises_at, lacks)
            engine.step()
    (result,) = finish(engine)
    assert result.pixels is not None
    assert result.pixels.tobytes() == reference(image)


def test_every_size_is_captured_at_start_up() -> None:
    network, metrics = denoiser(), Metrics()
    engine = Engine({"m": warm(network)}, CONFIG, metrics)
    assert network.queue.captures == 9  # three sizes each of steps, of their ends and of classifier calls
    for k in range(1, 5):
        engine.add(generation(str(k), *[params(classifier_scale=k % 2)] * k), submitted_at=0.0)
        finish(engine)
    assert network.queue.captures == 9
    assert metrics.registry.get_sample_value("iddpm_uncaptured_steps_total", {"model": "m"}) == 0


def test_a_size_without_memory_for_a_graph_runs_without_one_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    network, metrics = denoiser(), Metrics()
    network.queue.lacks_memory_after = 5
    with caplog.at_level("WARNING"):
        engine = Engine({"m": warm(network)}, CONFIG, metrics)
    assert caplog.messages == [
        f"exact arithmetic: not enough memory to capture {what} rows"
        for what in ("a step of 1", "the end of a step of 4", "the end of a step of 2", "the end of a step of 1")
    ]
    image = replace(params(steps=3, seed=4), class_index=1)
    engine.add(generation("r", image), submitted_at=0.0)
    (result,) = finish(engine)
    assert result.pixels is not None
    assert result.pixels.tobytes() == reference(image)
    assert metrics.registry.get_sample_value("iddpm_uncaptured_steps_total", {"model": "m"}) == 3


def test_the_end_of_a_step_without_memory_for_a_graph_runs_without_one() -> None:
    network = denoiser()
    network.queue.lacks_memory_after = 5
    engine = Engine({"m": warm(network)}, CONFIG, Metrics())
    images = [with_chain(params(seed=seed), 8, seed) for seed in range(2)]
    engine.add(generation("r", *images), submitted_at=0.0)
    for result in finish(engine):
        assert output_of(result) == sampled_alone(images[result.position], AsNetwork(denoiser()), xp=torch)


def test_a_step_whose_end_is_not_queued_ends_the_engine_because_it_cannot_be_repeated() -> None:
    network = denoiser()
    honest, broken = network.queue.capture, list[bool]()

    def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = honest(work)
        is_end = network.queue.captures > 2 * len(SIZES)  # after the gradients and the steps of all sizes

        def run() -> Tensor:
            if is_end and broken:
                raise MemoryError
            return replay()

        return run

    network.queue.capture = capture  # type: ignore[method-assign]
    engine = Engine({"m": warm(network)}, CONFIG, Metrics())
    broken.append(True)
    engine.add(generation("plain", params(steps=2)), submitted_at=0.0)
    assert finish(engine)[0].status is ImageStatus.DONE
    engine.add(generation("masked", with_chain(params(), 8)), submitted_at=0.0)
    with pytest.raises(StepIncomplete):
        finish(engine)


def test_a_size_that_was_not_captured_is_an_error_in_strict_mode() -> None:
    network = denoiser()
    network.queue.lacks_memory_after = 5
    with pytest.raises(ModelError, match="a step of 1 rows was not captured"):
        warm(network, CONFIG.replace(strict_graphs=True))


def test_a_graph_with_different_results_is_not_served() -> None:
    network = denoiser()
    honest = network.queue.capture

    def dishonest(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = honest(work)
        runner_x = slots.slots.x

        def run() -> Tensor:
            out = replay()
            runner_x[0] += 1e-6
            return out

        return run

    network.queue.capture = dishonest  # type: ignore[method-assign]
    slots = ArrayRunner(network, CONFIG)
    with pytest.raises(RuntimeError, match="gives different results with and without a graph"):
        slots.warm_up()


@pytest.mark.parametrize(
    ("fuse", "form", "warning"),
    [
        (lambda _: None, "separate", ""),
        (lambda work: lambda *a: work(*a), "fused", ""),
        (lambda work: lambda *a: work(*a[:5], (a[5][0] + 1, *a[5][1:]), a[6]), "separate", "other results"),  # noise
        (lambda work: lambda *a: work(*a)._replace(ok=a[0][:, 0] == a[0][:, 0]), "separate", "other results"),  # flags
        (lambda work: lambda *a: work(), "separate", "missing"),  # an error
    ],
    ids=["none", "equal", "other noise", "no flags", "no compiler"],
)
def test_noise_and_update_are_fused_where_that_gives_equal_results(
    fuse: Callable[..., Any], form: str, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = denoiser()
    network.queue.fuse = fuse  # type: ignore[method-assign]
    runner = warm(network)
    (steps,) = runner._queued  # noqa: SLF001
    assert steps.update_form == form
    assert (warning in caplog.text) if warning else ("more slowly" not in caplog.text)
    plain = warm(denoiser())
    assert (runner.numerics_id == plain.numerics_id) == (form == "separate")


def test_a_fused_kernel_that_differs_for_one_batch_size_is_not_served() -> None:
    def wrong_for_one_row(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a: work(a[0], a[1] * (1 if len(a[1]) > 1 else 2), *a[2:])

    network = denoiser()
    network.queue.fuse = wrong_for_one_row  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="fused noise and update of 1 rows differ"):
        warm(network)


def test_gradients_are_computed_for_images_with_classifier_guidance_and_cleared_by_the_next_step() -> None:
    class Counted(ExactClassifier):
        counts = torch.zeros(2, dtype=torch.int64)
        """Calls and their rows, counted on the device."""

        def __call__(self, inputs: NetworkInputs[Any]) -> Any:
            self.counts.add_(torch.tensor([1, len(inputs.x_t)]))
            return super().__call__(inputs)

    guide = Counted(tiny_classifier_config(), torch, batch_sizes=(1, 2, WIDTH))
    network = QueuedDenoiser(tiny_config(), batch_sizes=(1, 2, WIDTH), classifier=guide)
    runner = warm(network)
    engine = Engine({"m": runner}, CONFIG, Metrics())
    guide.counts.zero_()
    plain = params(steps=4, seed=8)
    engine.add(generation("guided", *[replace(params(steps=2), classifier_scale=2.0)] * 3), submitted_at=0.0)
    engine.add(generation("plain", plain), submitted_at=0.0)
    results = finish(engine)
    assert guide.counts.tolist() == [2, 2 * 4]
    assert results[-1].pixels is not None
    assert results[-1].pixels.tobytes() == reference(plain)
    after = [params(steps=4, seed=seed) for seed in range(WIDTH)]  # in every place that had a gradient
    engine.add(generation("after", *after), submitted_at=0.0)
    pixels = {r.position: r.pixels.tobytes() for r in finish(engine) if r.pixels is not None}
    assert [pixels[k] for k in range(WIDTH)] == [reference(image) for image in after]


def test_unused_rows_stay_finite() -> None:
    runner = warm(denoiser())
    engine = Engine({"m": runner}, CONFIG, Metrics())
    engine.add(generation("r", *[params(steps=50, seed=k) for k in range(3)]), submitted_at=0.0)
    finish(engine)
    spare = runner.slots.spare_slot
    table = runner.slots
    assert not any(bool(array[spare].any()) for array in (table.x, table.x0))


def test_steps_of_watched_images_are_reported_as_on_the_host() -> None:
    engine = Engine({"m": warm(denoiser())}, CONFIG, Metrics())
    engine.add(generation("r", params(steps=5), watch=Watch(preview_every=2)), submitted_at=0.0)
    reports = []
    while engine.has_work():
        engine.step()
        reports += engine.observations
    assert [seen.step for seen in reports if isinstance(seen, ImageProgress)] == [1, 2, 3, 4]
    assert [seen.step for seen in reports if not isinstance(seen, ImageProgress)] == [2, 4]


def test_noise_and_update_can_be_compiled_as_one_graph() -> None:
    plan = build_plan(tiny_config().diffusion, "ancestral", "4")
    lines, rows = torch.from_numpy(plan.table[:3].copy()), torch.arange(3)
    draw = torch.Generator().manual_seed(0)
    x_t, x0_prev, out, var_values, grad = (torch.randn(3, 1, 8, 8, generator=draw) for _ in range(5))
    traced = torch.compile(add_noise_and_advance, fullgraph=True, dynamic=False, backend="aot_eager")
    fused = traced(lines, x_t, x0_prev, out, var_values, (rows, rows, rows), grad)
    plain = add_noise_and_advance(lines, x_t, x0_prev, out, var_values, (rows, rows, rows), grad)
    assert torch.equal(fused.x_prev, plain.x_prev)
    assert torch.equal(fused.ok, plain.ok)
    assert callable(compiled(add_noise_and_advance))  # it accepts these options


def test_a_lost_device_fails_all_images_and_ends_the_engine() -> None:
    async def run() -> None:
        network, metrics = denoiser(), Metrics()
        engine = AsyncEngine(Engine({"m": ArrayRunner(network, CONFIG)}, CONFIG, metrics), CONFIG, metrics)
        engine.start()
        await eventually(lambda: engine.state is not EngineState.STARTING)
        done = engine.submit(generation("done", params(steps=3)))
        await asyncio.gather(*done.images)
        tickets = [engine.submit(generation(str(k), params(steps=500))) for k in range(3)]
        network.queue.error = RuntimeError("lost")
        for ticket in tickets:
            with pytest.raises(EngineDead):
                await ticket.images[0]
        assert engine.state is EngineState.DEAD

    run_async(run())


def test_a_model_is_released_after_the_steps_of_its_aborted_images() -> None:
    async def run() -> None:
        metrics = Metrics()
        engine = AsyncEngine(Engine({"m": ArrayRunner(denoiser(), CONFIG)}, CONFIG, metrics), CONFIG, metrics)
        engine.start()
        await eventually(lambda: engine.state is not EngineState.STARTING)
        ticket = engine.submit(generation("r", params(steps=500)))
        await eventually(lambda: metrics.registry.get_sample_value("iddpm_row_steps_total"))
        engine.abort("r")
        engine.retire("m")
        await ticket.ended
        await engine.stop()
        assert engine.state is EngineState.STOPPED

    run_async(run())


def test_a_copy_has_the_values_at_the_time_of_its_request() -> None:
    array = torch.zeros(3)
    copy = LateQueue(lambda *a: a, None).fetch(array)
    array += 1
    np.testing.assert_array_equal(copy.wait(), np.zeros(3))


@pytest.mark.parametrize("kind", [ExactDenoiser, QueuedDenoiser])
def test_dropped_objects_are_freed_without_garbage_collection(kind: type[ExactDenoiser]) -> None:
    runner: ArrayRunner[Any] = ArrayRunner(kind(tiny_config(), batch_sizes=SIZES), CONFIG)
    gc.collect()
    gc.disable()
    try:
        runner.warm_up()
        held = weakref.ref(runner), weakref.ref(runner.slots)
        del runner
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()
