"""Requests of two stages: results, progress, limits, predictions, failures. `test_random_scripts` compares pixels."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from diffusion.update import from_uint8_reversibly
from service.backends.pending import Pending
from service.engine.admission import Admission
from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.forecast import Forecast, Prediction
from service.engine.request import (
    GenerationRequest,
    Image,
    ImageParams,
    ImageProgress,
    ImageResult,
    ImageStatus,
    ImageStep,
    NextStage,
    Watch,
)
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts
from service.errors import NotFinite, UnknownModel
from service.metrics import Metrics
from service.models.registry import served_model
from service.requests.cascading import next_stage
from tests.denoisers import ExactDenoiser
from tests.fakes import CountingRunner, generation, params, tiny_config
from tests.waiting import eventually, runs

BASE = ExactDenoiser(tiny_config(image_size=4, attention_resolutions=()))
UPSAMPLER = ExactDenoiser(tiny_config(low_res_size=4))
CONFIG = EngineConfig(max_rows=4)


def next_of(images: tuple[ImageParams, ...]) -> NextStage:
    return next_stage(BASE.config, served_model("up", UPSAMPLER, "numerics"), images)


def test_what_a_small_image_becomes_is_what_a_file_of_it_would() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16
    result = ImageResult(request_id="", position=0, status=ImageStatus.DONE, pixels=pixels)
    cond = next_of(()).cond_of(params(), result)
    assert cond.shape == (1, 8, 8)
    assert next_of(()).cond_bytes == cond.nbytes
    np.testing.assert_array_equal(cond[:, 0, 0], from_uint8_reversibly(pixels[None])[0, :, 0, 0])


def request_of(
    name: str = "r", steps: int = 3, later: int = 2, n: int = 1, watch: Watch | None = None
) -> GenerationRequest:
    """Describe a request of which only the amount of work matters."""
    then = NextStage(
        model="up",
        images=(params(later),) * n,
        cond_of=lambda *_: np.zeros((1, 8, 8), np.float32),
        cond_bytes=256,
    )
    base = generation(name, *[params(steps)] * n, model="base", watch=watch)
    return replace(base, then=then, served_as="cascade")


def seconds_per_step(seconds: float) -> Snapshot:
    """Return the snapshot of an idle engine of two models, whose full steps take that long."""
    costs = StepCosts()
    costs.observe(CONFIG.max_rows, seconds)
    models = ("base", "up")
    return Snapshot.of(
        [], dict.fromkeys(models, 0), dict.fromkeys(models, CONFIG.max_rows), dict.fromkeys(models, costs.now)
    )


@asynccontextmanager
async def serving(
    second: CountingRunner | None = None, base: CountingRunner | None = None
) -> AsyncIterator[AsyncEngine]:
    """Run an engine of two models that only count."""
    runners = {"base": base or CountingRunner(), "up": second or CountingRunner()}
    engine = AsyncEngine(Engine(runners, CONFIG, Metrics()), CONFIG, Metrics())
    engine.start()
    await eventually(lambda: engine.state is EngineState.READY)
    yield engine
    await engine.stop()


@runs
async def test_one_ticket_has_one_result_per_image_and_progress_over_both_stages() -> None:
    async with serving() as engine:
        ticket = engine.submit(request_of(watch=Watch(), n=2))
        assert engine.ledger.given_bytes == 512
        assert ticket.events is not None
        seen = [event async for event in ticket.events]
        results = [await image for image in ticket.images]
        assert [result.status for result in results] == [ImageStatus.DONE] * 2
        # Newer events replace unread ones. After step 3 the first stage is done, and the image is not
        assert {(event.step, event.steps) for event in seen if isinstance(event, ImageProgress)} <= {
            (1, 5), (2, 5), (4, 5)
        }  # fmt: skip
        await engine.wait_idle()
        assert (engine.ledger.rows, engine.ledger.given_bytes) == (0, 0)
        assert all(not (work.rows or work.expected or work.row_steps) for work in engine.ledger.models.values())
        assert engine.activity.of("cascade").images_done == 2


@runs
async def test_images_change_stages_while_the_next_network_call_runs() -> None:
    class Counted(CountingRunner):
        launched = 0

        def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
            self.launched += 1
            return super().launch(steps)

    runner, under_way = Counted(), []

    def cond_of(*_: object) -> npt.NDArray[np.float32]:
        under_way.append(runner.launched - len(runner.calls))
        return np.zeros((1, 8, 8), np.float32)

    request = request_of()
    assert request.then is not None
    async with serving(base=runner) as engine:
        longer = engine.submit(generation("longer", params(300), model="base"))
        ticket = engine.submit(replace(request, then=replace(request.then, cond_of=cond_of)))
        await ticket.images[0]
        await longer.images[0]
    assert under_way == [1]


@runs
async def test_an_image_that_fails_in_its_second_stage_fails() -> None:
    async with serving(CountingRunner(fail_slots_at=dict.fromkeys(range(CONFIG.num_slots), 1))) as engine:
        ticket = engine.submit(request_of())
        with pytest.raises(NotFinite):
            await ticket.images[0]
        await engine.wait_idle()
        assert not engine.ledger.orders


@runs
async def test_an_abort_at_any_time_ends_every_image_once() -> None:
    async with serving() as engine:
        for pause in range(12):
            ticket = engine.submit(request_of(f"r{pause}", n=3))
            for _ in range(pause):
                await asyncio.sleep(0)
            engine.abort(f"r{pause}")
            await asyncio.gather(*ticket.images, return_exceptions=True)
            await ticket.ended
            assert len(ticket.outcomes) == 3
        await engine.wait_idle()
        assert not engine.ledger.orders


@runs
async def test_a_retired_upsampler_stays_until_its_images_are_done() -> None:
    async with serving() as engine:
        ticket = engine.submit(request_of(steps=40))
        engine.retire("up")
        assert engine.ledger.models["up"].expected == 2  # row-steps
        with pytest.raises(UnknownModel):
            engine.submit(request_of("again"))
        assert (await ticket.images[0]).status is ImageStatus.DONE
        await engine.wait_idle()
        assert "up" not in engine.ledger.models


@runs
async def test_the_prediction_covers_both_stages() -> None:
    async with serving() as engine:
        one = engine.submit(generation("one", params(300), model="base"))
        alone = one.prediction.finish_s
        await one.images[0]
        other = engine.submit(request_of("both", steps=300, later=900))
        assert other.prediction.finish_s > 1.5 * alone
        newer = engine.eta("both")
        assert isinstance(newer, Prediction)
        assert newer.finish_s > 0
        await other.images[0]
        assert engine.eta("both") is None


def test_the_remaining_work_covers_both_stages() -> None:
    metrics = Metrics()
    engine = Engine({"base": CountingRunner(), "up": CountingRunner()}, CONFIG, metrics)
    engine.add(request_of(steps=3, later=5, n=2), 0.0)
    engine.add(request_of("aborted", steps=4, later=2), 0.0)
    left = []
    while engine.has_work():
        left.append(metrics.registry.get_sample_value("iddpm_remaining_row_steps"))
        engine.step()
        engine.abort("aborted")
    assert left == [2 * 8 + 6, *range(14, 0, -2)]
    assert metrics.registry.get_sample_value("iddpm_remaining_row_steps") == 0


def test_work_that_later_stages_bring_is_part_of_the_backlog() -> None:
    admission = Admission(CONFIG, ["base", "up"])
    admission.accept(request_of(steps=3, later=5, n=4), 0.0, seconds_per_step(1.0))
    assert Forecast(CONFIG, admission.ledger).backlog_s(seconds_per_step(1.0)) == 3 + 5


@runs
async def test_the_arrays_of_an_image_are_freed_with_it() -> None:
    """Without the garbage collector: given arrays count towards a limit only until their image has ended."""
    freed: list[weakref.ref[Image]] = []
    gc.disable()
    try:
        engine = Engine({"base": CountingRunner(), "up": CountingRunner()}, CONFIG, Metrics())
        engine.add(request_of(), 0.0)
        freed = [weakref.ref(image) for image in engine.scheduler.in_flight()]
        results: list[ImageResult] = []
        while engine.has_work():
            results += engine.step()
            freed += [weakref.ref(image) for image in engine.scheduler.in_flight()]
        engine.add(request_of("next"), 0.0)  # the engine keeps the images of the last step
        while engine.has_work():
            engine.step()
        assert [result.status for result in results] == [ImageStatus.DONE]
        assert [image() for image in freed] == [None] * len(freed)
    finally:
        gc.enable()


@runs
async def test_limits_count_an_image_in_the_stage_that_has_more_rows() -> None:
    request = request_of(n=2)
    assert request.then is not None
    wide = replace(request, then=replace(request.then, images=(params(2, cfg_scale=2.0),) * 2))
    async with serving() as engine:
        ticket = engine.submit(wide)
        assert engine.ledger.rows == engine.ledger.client("").rows == 4
        await asyncio.gather(*ticket.images)
        await engine.wait_idle()
        assert engine.ledger.rows == 0


def test_a_first_stage_that_fails_after_an_abort_is_counted_once() -> None:
    metrics = Metrics()
    failing = CountingRunner(fail_slots_at=dict.fromkeys(range(64), 3))
    engine = Engine({"base": failing, "up": CountingRunner()}, CONFIG, metrics)
    engine.add(request_of(), 0.0)
    for _ in range(3):
        engine.launch()
        engine.settle()
    assert [result.status for result in engine.abort("r")] == [ImageStatus.ABORTED]
    assert engine.report() == []
    assert not engine.has_work()
    assert metrics.registry.get_sample_value("iddpm_wasted_row_steps_total") == 3
