"""The engine behind asyncio: refusal, cancellation and draining; every wait ends."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.backends.base import FailureKind
from service.engine import async_engine
from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import Priority
from service.engine.tickets import Ticket
from service.engine.watchdog import HANG_FLOOR_S
from service.errors import (
    ClientLimit,
    DeadlineUnmeetable,
    Draining,
    EngineDead,
    ImageFailed,
    InvalidRequest,
    ModelError,
    NotFinite,
    QueueFull,
)
from service.metrics import Metrics
from tests.counts import count
from tests.fakes import CountingRunner, generation, params
from tests.waiting import PATIENCE_S, eventually, run_async, runs

CONFIG = EngineConfig(max_rows=2, max_queue=3, policy="fifo", timed_calls=0)


class PausedRunner(CountingRunner):
    """Waits in its first step until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self.released = threading.Event()

    def step(self, slots: Sequence[int]) -> list[bool]:
        self.arrived.set()
        assert self.released.wait(timeout=PATIENCE_S)
        return super().step(slots)


@asynccontextmanager
async def started(
    runner: CountingRunner, config: EngineConfig = CONFIG, metrics: Metrics | None = None, step_s: float | None = None
) -> AsyncIterator[AsyncEngine]:
    """Run an engine; `step_s` is the measured time of a step of two rows."""
    metrics = metrics or Metrics()
    in_thread = Engine({"m": runner}, config, metrics)
    engine = AsyncEngine(in_thread, config, metrics)
    engine.start()
    await eventually(lambda: engine.state is not EngineState.STARTING)
    if step_s is not None:  # the thread is still idle
        in_thread.costs["m"].observe(2, step_s)
        in_thread.publish()
    yield engine
    if engine.state is not EngineState.DEAD:
        if isinstance(runner, PausedRunner):
            runner.released.set()
        await engine.stop()


async def outcome(future: Awaitable[object]) -> str:
    try:
        await future
    except Exception as error:
        return type(error).__name__
    return "done"


@runs
async def test_an_accepted_request_gets_its_images() -> None:
    async with started(CountingRunner()) as engine:
        ticket = engine.submit(generation("r", params(steps=3), params(steps=5)))
        images = await asyncio.gather(*ticket.images)
        assert [int(image.pixels[0, 0, 0]) for image in images if image.pixels is not None] == [3, 5]


@runs
async def test_exactly_the_requests_that_do_not_fit_are_refused() -> None:
    runner = PausedRunner()
    async with started(runner) as engine:
        accepted = [engine.submit(generation(str(k), params())) for k in range(CONFIG.max_in_flight)]
        for k in range(4):
            with pytest.raises(QueueFull) as refusal:
                engine.submit(generation(f"late{k}", params()))
            assert refusal.value.retry_after_s >= 1
        runner.released.set()
        await asyncio.gather(*(image for ticket in accepted for image in ticket.images))
        engine.submit(generation("after", params()))


@runs
async def test_a_request_that_can_never_fit_is_invalid_rather_than_full() -> None:
    async with started(CountingRunner()) as engine:
        with pytest.raises(InvalidRequest, match="n: must be at most 5"):
            engine.submit(generation("big", *[params()] * 6))


@runs
async def test_a_cancelled_request_ends_and_frees_its_capacity() -> None:
    runner = PausedRunner()
    async with started(runner) as engine:
        ticket = engine.submit(generation("r", *[params(steps=1000)] * CONFIG.max_in_flight))
        engine.abort("r")
        runner.released.set()
        assert {await outcome(future) for future in ticket.images} == {"Aborted"}
        assert len(runner.calls) <= 1
        engine.submit(generation("next", params()))


@runs
async def test_draining_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    runner = PausedRunner()
    async with started(runner) as engine:
        ticket = engine.submit(generation("r", params()))
        engine.drain()
        with pytest.raises(Draining):
            engine.submit(generation("late", params()))
        runner.released.set()
        await engine.stop()
        assert ticket.images[0].result().pixels is not None


@runs
async def test_an_image_that_is_not_finite_fails_and_its_neighbour_does_not() -> None:
    first_slot = CONFIG.num_slots - 1
    async with started(CountingRunner(fail_slots_at={first_slot: 2})) as engine:
        ticket = engine.submit(generation("r", params(), params()))
        assert [await outcome(future) for future in ticket.images] == [NotFinite.__name__, "done"]


@runs
async def test_an_error_in_the_engine_reaches_every_waiting_request() -> None:
    async with started(CountingRunner(error_at=2)) as engine:
        tickets = [engine.submit(generation(str(k), params())) for k in range(5)]
        outcomes = {await outcome(future) for ticket in tickets for future in ticket.images}
        assert outcomes == {EngineDead.__name__}
        assert engine.state is EngineState.DEAD
        with pytest.raises(Draining, match="the engine is dead"):
            engine.submit(generation("late", params()))


@runs
async def test_images_that_were_done_before_the_engine_died_are_delivered() -> None:
    class DiesWhenItEvicts(PausedRunner):
        def evict(self, slots: Sequence[int]) -> list[object]:
            raise MemoryError("no room on the host")

    runner, config = DiesWhenItEvicts(), EngineConfig(max_rows=2, slots_per_row=1, timed_calls=0)
    async with started(runner, config) as engine:
        first = engine.submit(generation("first", params(steps=1), params(steps=500)))
        await eventually(runner.arrived.is_set)
        urgent = engine.submit(generation("urgent", params(steps=3), params(steps=3)))
        runner.released.set()
        assert [await outcome(future) for future in (*first.images, *urgent.images)] == [
            "done",
            *["EngineDead"] * 3,
        ]


@runs
async def test_a_device_error_is_not_retried_and_ends_the_engine() -> None:
    class Lost(CountingRunner):
        def failure_kind(self, error: Exception) -> FailureKind:
            return FailureKind.DEVICE

    runner = Lost(error_at=1)
    async with started(runner) as engine:
        tickets = [engine.submit(generation(str(k), params(), params())) for k in range(2)]
        outcomes = {await outcome(future) for ticket in tickets for future in ticket.images}
        assert outcomes == {EngineDead.__name__}
        assert engine.state is EngineState.DEAD
        assert len(runner.calls) == 1


@runs
async def test_an_image_that_makes_the_network_raise_fails_alone_with_a_reason() -> None:
    class Raising(CountingRunner):
        def step(self, slots: Sequence[int]) -> list[bool]:
            if CONFIG.num_slots - 1 in slots:  # the first slot that is assigned
                raise ValueError("secret detail")
            return super().step(slots)

    async with started(Raising()) as engine:
        ticket = engine.submit(generation("r", params(), params()))
        with pytest.raises(ImageFailed, match="image 0: the network failed on it, even alone") as failure:
            await ticket.images[0]
        assert "secret" not in str(failure.value)
        assert (await ticket.images[1]).pixels is not None
        assert engine.state is EngineState.READY


@runs
async def test_a_step_that_hangs_fails_all_requests_at_once_without_waiting_for_the_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(async_engine, "CHECK_INTERVAL_S", 0.002)
    runner = PausedRunner()
    in_thread = Engine({"m": runner}, CONFIG, Metrics(), clock=lambda: now)
    engine = AsyncEngine(in_thread, CONFIG, Metrics())
    others = set(threading.enumerate())
    engine.start()
    [thread] = set(threading.enumerate()) - others
    await eventually(lambda: engine.state is EngineState.READY)
    tickets = [engine.submit(generation(str(k), params())) for k in range(3)]
    await eventually(runner.arrived.is_set)
    tickets.append(engine.submit(generation("queued", params())))
    now = HANG_FLOOR_S - 0.5
    await asyncio.sleep(0.02)
    assert engine.state is EngineState.READY
    while engine.state is EngineState.READY:  # each check counts a second at most
        now += 0.25
        await asyncio.sleep(0.001)
    assert now > HANG_FLOOR_S
    outcomes = [await outcome(future) for ticket in tickets for future in ticket.images]
    assert outcomes == [EngineDead.__name__] * 4
    await engine.reached(EngineState.DEAD)
    await engine.stop()
    assert engine.state is EngineState.DEAD
    runner.released.set()
    await asyncio.to_thread(thread.join)  # the thread ends by itself if the step ever returns
    assert [future.done() for ticket in tickets for future in ticket.images] == [True] * 4
    assert "queued" not in {image.request_id for image in in_thread.scheduler.in_flight()}  # its command was discarded


class UnluckyRunner(CountingRunner):
    """Raises if certain slots take part, and if there are more slots than fit; some rows overflow."""

    def __init__(self, raising: set[int], overflowing: set[int], fits: int) -> None:
        super().__init__(dict.fromkeys(overflowing, 2))
        self._raising = raising
        self._fits = fits

    def step(self, slots: Sequence[int]) -> list[bool]:
        if len(slots) > self._fits:
            raise MemoryError
        if self._raising & set(slots):
            raise ValueError
        return super().step(slots)


@settings(max_examples=count(200))
@given(
    script=st.lists(st.tuples(st.sampled_from(["submit", "abort", "pause"]), st.integers(0, 5)), max_size=12),
    raising=st.sets(st.integers(0, CONFIG.num_slots - 1), max_size=2),
    overflowing=st.sets(st.integers(0, CONFIG.num_slots - 1), max_size=2),
    fits=st.integers(1, 2),
)
def test_every_future_resolves_exactly_once_and_nothing_is_left_in_flight(
    script: list[tuple[str, int]], raising: set[int], overflowing: set[int], fits: int
) -> None:
    async def check() -> None:
        resolved: Counter[int] = Counter()
        tickets: list[Ticket] = []
        async with started(UnluckyRunner(raising, overflowing, fits)) as engine:
            for action, number in script:
                if action == "submit":
                    try:
                        tickets.append(engine.submit(generation(str(len(tickets)), *[params()] * (1 + number % 3))))
                    except QueueFull:
                        continue
                    for future in tickets[-1].images:
                        future.add_done_callback(lambda future: resolved.update([id(future)]))
                elif action == "abort":
                    engine.abort(str(number))
                else:
                    await asyncio.sleep(0)
            ends = {await outcome(future) for ticket in tickets for future in ticket.images}
            await engine.wait_idle()
            await asyncio.sleep(0)  # callbacks of futures run after the tasks that awaited them
            assert ends <= {"done", "Aborted", "NotFinite", "ImageFailed"}
            assert [resolved[id(future)] for ticket in tickets for future in ticket.images] == [1] * resolved.total()
            assert resolved.total() == sum(len(ticket.images) for ticket in tickets)
            assert engine.ledger.rows == engine.ledger.requests == len(engine.ledger.orders) == 0
            assert engine.state is EngineState.READY

    run_async(check())


@runs
async def test_a_state_is_logged_when_it_is_reached_and_stays_reached(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="service.engine.async_engine")
    engine = AsyncEngine(Engine({"m": CountingRunner()}, CONFIG, Metrics()), CONFIG, Metrics())
    reached = [asyncio.create_task(engine.reached(state)) for state in (EngineState.READY, EngineState.STOPPED)]
    await asyncio.sleep(0)
    assert [task.done() for task in reached] == [False, False]
    engine.start()
    await engine.reached(EngineState.READY)
    await engine.stop()
    await asyncio.gather(*reached)
    await engine.reached(EngineState.READY)
    assert [record.message for record in caplog.records] == ["engine: ready", "engine: draining", "engine: stopped"]


@runs
async def test_a_failing_warm_up_is_reported_too() -> None:
    class Broken(CountingRunner):
        def warm_up(self) -> None:
            raise RuntimeError("no such device")

    async with started(Broken()) as engine:
        assert engine.state is EngineState.DEAD


@runs
async def test_a_model_that_fails_its_self_test_is_reported_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class NotFinite(CountingRunner):
        def warm_up(self) -> None:
            raise ModelError("the network's output is not finite")

    async with started(NotFinite()) as engine:
        assert engine.state is EngineState.DEAD
    (line,) = [record for record in caplog.records if record.message.startswith("the engine stopped")]
    assert line.message == "the engine stopped with an error: the network's output is not finite"
    assert not line.exc_info


@runs
async def test_retry_after_grows_with_accepted_work() -> None:
    async with started(PausedRunner(), step_s=1.0) as engine:
        retries = []
        for request in (generation("r", params(steps=100)), generation("s", params(steps=100, cfg_scale=2.0))):
            engine.submit(request)
            with pytest.raises(QueueFull) as refused:
                engine.submit(generation("t", *[params(steps=100)] * 5))
            retries.append(refused.value.retry_after_s)
        assert retries[1] > retries[0] > 1
        engine.abort("r")
        engine.abort("s")


@runs
async def test_guided_images_count_twice_against_the_limit() -> None:
    async with started(PausedRunner()) as engine:
        engine.submit(generation("a", params(cfg_scale=2.0), params(cfg_scale=2.0)))
        with pytest.raises(QueueFull, match="4 rows are in flight, the limit is 5; this request has 2"):
            engine.submit(generation("b", params(cfg_scale=2.0)))
        engine.submit(generation("c", params()))
        with pytest.raises(InvalidRequest, match="n: must be at most 2"):
            engine.submit(generation("big", *[params(cfg_scale=2.0)] * 3))


@runs
async def test_a_client_cannot_fill_the_queue_and_others_are_admitted() -> None:
    async with started(PausedRunner(), CONFIG.replace(client_share=0.5)) as engine:
        engine.submit(generation("a", params(), params(), client="crowd"))
        with pytest.raises(ClientLimit, match="2 rows of this client are in flight, the limit is 2; ") as refusal:
            engine.submit(generation("b", params(), client="crowd"))
        assert refusal.value.retry_after_s >= 1
        engine.submit(generation("c", params(), params(), params(), client="other"))  # the first of a client may be big


@runs
async def test_a_deadline_that_cannot_be_met_is_refused_with_the_predicted_finish() -> None:
    async with started(PausedRunner(), step_s=1.0) as engine:
        engine.submit(generation("a", params(steps=100), params(steps=100)))
        with pytest.raises(
            DeadlineUnmeetable, match="predicted to finish in 125 s; got a deadline of 124 s"
        ) as refusal:
            engine.submit(generation("b", *[params(steps=25)], deadline_s=124.0))
        assert (refusal.value.predicted_s, refusal.value.deadline_s) == (125.0, 124.0)
        ticket = engine.submit(generation("c", params(steps=25), deadline_s=126.0))
        assert ticket.prediction.finish_s == 125.0
        assert engine.eta("a") is not None
        assert engine.eta("unknown") is None


@runs
async def test_a_request_with_too_long_a_predicted_wait_is_refused_except_for_batch_work() -> None:
    async with started(PausedRunner(), CONFIG.replace(max_wait_s=60.0), step_s=1.0) as engine:
        for name in ("a", "b"):  # at any length while there are free rows
            engine.submit(generation(name, params(steps=500)))
        with pytest.raises(QueueFull, match=r"the predicted wait is (499|500) s, the limit is 60 s") as refusal:
            engine.submit(generation("c", params(steps=9)))
        assert refusal.value.retry_after_s > 1
        engine.submit(generation("d", params(steps=9), priority=Priority.BATCH))


@runs
async def test_predictions_are_compared_with_actual_times() -> None:
    metrics = Metrics()
    async with started(CountingRunner(), metrics=metrics, step_s=1e-9) as engine:
        ticket = engine.submit(generation("r", params(), params(), deadline_s=1e-6))
        await asyncio.gather(*ticket.images)
        value = metrics.registry.get_sample_value
        assert value("iddpm_finish_over_predicted_ratio_count") == 1
        assert value("iddpm_predicted_wait_seconds_count") == 1
        assert value("iddpm_deadline_misses_total") == 2
        assert engine.eta("r") is None
