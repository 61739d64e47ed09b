"""The engine behind asyncio: refuses, cancels, drains, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest

from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import Priority
from service.errors import ClientLimit, DeadlineUnmeetable, Draining, EngineDead, InvalidRequest, NotFinite, QueueFull
from service.metrics import Metrics
from tests.fakes import CountingRunner, generation, params

CONFIG = EngineConfig(max_rows=2, max_queue=3, policy="fifo", timed_calls=0)


def runs(test: Callable[[], Coroutine[object, object, None]]) -> Callable[[], None]:
    """Run a test's coroutine, and fail rather than hang."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), timeout=120))

    return run


class PausedRunner(CountingRunner):
    """Takes no step until it is released."""

    def __init__(self) -> None:
        super().__init__()
        import threading

        self.released = threading.Event()

    def step(self, slots: list[int]) -> list[bool]:  # type: ignore[override]  # the engine passes lists
        assert self.released.wait(timeout=100)
        return super().step(slots)


@asynccontextmanager
async def started(
    runner: CountingRunner, config: EngineConfig = CONFIG, metrics: Metrics | None = None
) -> AsyncIterator[AsyncEngine]:
    metrics = metrics or Metrics()
    engine = AsyncEngine(Engine({"m": runner}, config, metrics), config, metrics)
    engine.start()
    await until(lambda: engine.state is not EngineState.STARTING)
    yield engine
    if engine.state is not EngineState.DEAD:
        if isinstance(runner, PausedRunner):
            runner.released.set()
        await engine.stop()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # the state has no event of its own
        await asyncio.sleep(0.001)


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
async def test_exactly_as_many_are_refused_as_do_not_fit() -> None:
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
async def test_a_cancelled_request_ends_and_makes_room() -> None:
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
async def test_a_failing_warm_up_is_reported_too() -> None:
    class Broken(CountingRunner):
        def warm_up(self) -> None:
            raise RuntimeError("no such device")

    async with started(Broken()) as engine:
        assert engine.state is EngineState.DEAD


@runs
async def test_the_predicted_wait_grows_with_accepted_work() -> None:
    runner = PausedRunner()
    async with started(runner) as engine:
        engine._engine.costs["m"].observe(2, 1.0)
        engine.submit(generation("r", params(steps=100)))
        before = engine.predicted_wait_s()
        engine.submit(generation("s", params(steps=100, cfg_scale=2.0)))
        assert (before, engine.predicted_wait_s()) == (50.0, 150.0)
        engine.abort("r")
        engine.abort("s")


@runs
async def test_guided_images_count_twice_against_the_limit() -> None:
    async with started(PausedRunner()) as engine:
        engine.submit(generation("a", params(cfg_scale=2.0), params(cfg_scale=2.0)))
        with pytest.raises(QueueFull, match="4 rows are in flight, at most 5 can be; this request has 2"):
            engine.submit(generation("b", params(cfg_scale=2.0)))
        engine.submit(generation("c", params()))
        with pytest.raises(InvalidRequest, match="n: must be at most 2"):
            engine.submit(generation("big", *[params(cfg_scale=2.0)] * 3))


@runs
async def test_a_named_client_cannot_fill_the_queue_and_others_still_get_in() -> None:
    async with started(PausedRunner()) as engine:
        engine.submit(generation("a", params(), params(), client="crowd"))
        with pytest.raises(ClientLimit, match="2 rows of this client are in flight, at most 2 can be") as refusal:
            engine.submit(generation("b", params(), client="crowd"))
        assert refusal.value.retry_after_s >= 1
        engine.submit(generation("c", params(), params(), params(), client="other"))  # the first of a client may be big


@runs
async def test_a_deadline_that_cannot_be_met_is_refused_with_the_predicted_finish() -> None:
    async with started(PausedRunner()) as engine:
        engine._engine.costs["m"].observe(2, 1.0)
        engine.submit(generation("a", params(steps=100), params(steps=100)))
        with pytest.raises(DeadlineUnmeetable, match="would be done in 125 s, wanted within 124 s") as refusal:
            engine.submit(generation("b", *[params(steps=25)], deadline_s=124.0))
        assert (refusal.value.predicted_s, refusal.value.deadline_s) == (125.0, 124.0)
        ticket = engine.submit(generation("c", params(steps=25), deadline_s=126.0))
        assert ticket.prediction.finish_s == 125.0
        assert engine.eta("a") is not None
        assert engine.eta("unknown") is None


@runs
async def test_a_wait_that_would_be_too_long_is_refused_except_for_batch_work() -> None:
    async with started(PausedRunner(), CONFIG.replace(max_wait_s=60.0)) as engine:
        engine._engine.costs["m"].observe(2, 1.0)
        engine.submit(generation("a", params(steps=500)))  # alone, whatever it takes
        engine.submit(generation("b", params(steps=500)))  # the second row is free
        with pytest.raises(QueueFull, match="the predicted wait is 500 s, at most 60 s can be") as refusal:
            engine.submit(generation("c", params(steps=9)))
        assert refusal.value.retry_after_s > 1
        engine.submit(generation("d", params(steps=9), priority=Priority.BATCH))


@runs
async def test_predictions_are_compared_with_what_came_of_them() -> None:
    metrics = Metrics()
    async with started(CountingRunner(), metrics=metrics) as engine:
        engine._engine.costs["m"].observe(2, 1e-9)
        ticket = engine.submit(generation("r", params(), params(), deadline_s=1e-6))
        await asyncio.gather(*ticket.images)
        value = metrics.registry.get_sample_value
        assert value("iddpm_finish_over_predicted_ratio_count") == 1
        assert value("iddpm_predicted_wait_seconds_count") == 1
        assert value("iddpm_deadline_misses_total") == 2
        assert engine.eta("r") is None
