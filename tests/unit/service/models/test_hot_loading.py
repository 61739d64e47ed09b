"""Models are loaded and dropped while the engine works: no image is lost, no memory is kept, and every wait ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.model_ids import model_id, name_of
from service.engine.step_costs import StepCosts
from service.engine.timing import time_steps
from service.errors import Draining, EngineDead, UnknownModel
from service.metrics import Metrics
from tests.fakes import CountingRunner, generation, params
from tests.waiting import PATIENCE_S, eventually, runs

CONFIG = EngineConfig(max_rows=2, max_queue=30, policy="fifo", timed_calls=0)


class Measured(StepCosts):
    """Measured costs: one second a step."""

    def __init__(self) -> None:
        super().__init__()
        self.observe(2, 1.0)


@asynccontextmanager
async def started(runner: CountingRunner, metrics: Metrics | None = None) -> AsyncIterator[AsyncEngine]:
    metrics = metrics or Metrics()
    engine = AsyncEngine(Engine({"m": runner}, CONFIG, metrics), CONFIG, metrics)
    del runner  # otherwise it would be kept here
    engine.start()
    await eventually(lambda: engine.state is not EngineState.STARTING)
    yield engine
    if engine.state is not EngineState.DEAD:
        await engine.stop()


def test_ids_of_generations_differ_and_their_names_are_equal() -> None:
    assert [model_id("fashion.32@x", n) for n in (1, 2, 11)] == ["fashion.32@x", "fashion.32@x/2", "fashion.32@x/11"]
    assert {name_of(model_id("a@b", n)) for n in range(1, 12)} == {"a@b"}


def test_steps_alternate_between_an_old_model_and_its_replacement_and_none_is_repeated() -> None:
    old, new = CountingRunner(), CountingRunner()
    metrics = Metrics()
    engine = Engine({"m": old}, CONFIG, metrics)
    engine.add(generation("before", params(steps=4)), 0.0)
    engine.step()
    engine.load("m/2", new, Measured())
    engine.add(generation("after", params(steps=3), model="m/2"), 0.0)
    ended = [result.request_id for _ in range(6) for result in engine.step()]
    assert (len(old.calls), len(new.calls)) == (4, 3)
    assert ended == ["before", "after"]
    assert not engine.has_work()
    assert metrics.registry.get_sample_value("iddpm_network_calls_total", {"model": "m"}) == 7
    engine.drop("m")
    assert set(engine.snapshot.widths) == set(engine.snapshot.steps) == set(engine.snapshot.costs) == {"m/2"}
    assert metrics.registry.get_sample_value("iddpm_width_rows", {"model": "m"}) == 2
    engine.drop("m/2")
    assert metrics.registry.get_sample_value("iddpm_width_rows", {"model": "m"}) is None


def test_a_model_with_images_in_flight_is_not_dropped() -> None:
    engine = Engine({"m": CountingRunner()}, CONFIG, Metrics())
    engine.add(generation("r", params()), 0.0)
    with pytest.raises(RuntimeError, match="m has images in flight"):
        engine.drop("m")
    engine.abort("r")
    engine.drop("m")


def test_steps_are_timed_before_the_engine_gets_the_runner() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    costs = time_steps(CountingRunner(), CONFIG.replace(timed_calls=2), clock)
    assert costs.table() == {1: 0.5, 2: 0.5}


def test_of_a_slow_network_only_the_smallest_size_is_timed() -> None:
    now = 0.0

    class Slow(CountingRunner):
        def step(self, slots: Sequence[int]) -> list[bool]:
            nonlocal now
            now += 70.0 * len(slots)
            return super().step(slots)

    runner = Slow()
    costs = time_steps(runner, CONFIG.replace(timed_calls=2), lambda: now)
    assert (costs.table(), now) == ({1: 70.0}, 140.0)  # after a warm-up step
    assert costs.seconds(2) == 140.0


class Held(CountingRunner):
    """Waits in every step until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self.let = threading.Semaphore(0)

    def step(self, slots: Sequence[int]) -> list[bool]:
        self.arrived.set()
        assert self.let.acquire(timeout=PATIENCE_S)
        return super().step(slots)


async def step_in_progress(runner: Held) -> None:
    await eventually(runner.arrived.is_set)


async def gone(held: weakref.ref[CountingRunner]) -> None:
    await eventually(lambda: gc.collect() >= 0 and held() is None)


@runs
async def test_accepted_requests_finish_on_the_old_weights_which_are_then_freed() -> None:
    old: Held | None = Held()
    assert old is not None
    held: weakref.ref[CountingRunner] = weakref.ref(old)
    async with started(old) as engine:
        before = engine.submit(generation("before", params(steps=5)))
        await step_in_progress(old)
        loading = asyncio.ensure_future(engine.load("m/2", CountingRunner(), Measured()))
        await asyncio.sleep(0)
        assert not loading.done()  # a step is in progress
        old.let.release()
        await loading
        engine.retire("m")
        assert engine.models_held == 2
        with pytest.raises(UnknownModel, match='model: must be one of m; got "m"'):
            engine.submit(generation("late", params()))
        after = engine.submit(generation("after", params(steps=2), model="m/2"))
        assert after.prediction.finish_s > 0
        assert engine.ledger.models["m/2"].row_steps == 2
        old.let.release(100)
        await asyncio.gather(*before.images, *after.images)
        assert len(old.calls) == 5
        assert engine.models_held == 1
        assert [work.row_steps for work in engine.ledger.models.values()] == [0]
        old = None
        await gone(held)

        newer = CountingRunner()
        held = weakref.ref(newer)
        await engine.load("m/3", newer, Measured())
        engine.retire("m/2")
        del newer
        again = engine.submit(generation("again", params(steps=2), model="m/3"))
        assert (again.prediction.position, again.prediction.wait_s) == (0, 0)  # no images of the old model are left
        assert (await again.images[0]).pixels is not None
        await engine.load("m/4", CountingRunner(), Measured())
        engine.retire("m/3")
        await gone(held)


@runs
async def test_old_weights_are_freed_after_cancelled_images_too() -> None:
    old = Held()
    async with started(old) as engine:
        ticket = engine.submit(generation("r", params(steps=1000)))
        old.let.release()
        await engine.load("m/2", CountingRunner(), StepCosts())
        engine.retire("m")
        engine.abort("r")
        old.let.release(3)
        await asyncio.gather(*ticket.images, return_exceptions=True)
        assert engine.models_held == 1
        assert len(old.calls) < 5


@runs
async def test_waits_end_when_the_engine_dies_and_a_draining_engine_loads_no_model() -> None:
    class Dying(Held):
        def step(self, slots: Sequence[int]) -> list[bool]:
            super().step(slots)
            raise SystemError("the device caught fire")

        def check_network(self) -> None:
            raise SystemError("and still burns")

    dying = Dying()
    async with started(dying) as engine:
        ticket = engine.submit(generation("r", params()))
        await step_in_progress(dying)
        loading = asyncio.ensure_future(engine.load("m/2", CountingRunner(), StepCosts()))
        await asyncio.sleep(0)
        dying.let.release(10)
        with pytest.raises(EngineDead):
            await loading
        await asyncio.gather(*ticket.images, return_exceptions=True)
        with pytest.raises(Draining):
            await engine.load("m/3", CountingRunner(), StepCosts())
    async with started(CountingRunner()) as engine:
        engine.drain()
        with pytest.raises(Draining):
            await engine.load("m/2", CountingRunner(), StepCosts())
