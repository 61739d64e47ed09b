"""The scheduler selects by arrival, keeps within its width and slots, and loses no image."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.config import EngineConfig
from service.engine.policies import PolicyName
from service.engine.request import Image, ImageStatus, StepBatch
from service.engine.scheduler import TRIAL_INTERVAL, TRIAL_STEPS, Scheduler
from tests.arriving import ArrivingScheduler
from tests.counts import count
from tests.fakes import generation, params

WIDTH = 4


def make(models: tuple[str, ...] = ("m",), policy: PolicyName = "fifo", **changes: int) -> Scheduler:
    sizes = {"max_rows": WIDTH, "slots_per_row": 2, **changes}
    return ArrivingScheduler(EngineConfig(policy=policy).replace(**sizes), models)


def image(name: str, steps: int = 3, guided: bool = False, model: str = "m") -> Image:
    scale = 2.0 if guided else 1.0
    return Image(request=generation(name, params(steps, scale), model=model), position=0, submitted_at=0.0)


def names(batch: StepBatch | None) -> list[str]:
    return [] if batch is None else [i.request_id for i in batch.images]


def run_step(scheduler: Scheduler) -> tuple[list[str], list[str]]:
    """Take a step; return the names of images that took it and that left."""
    batch = scheduler.schedule(now=1.0)
    assert batch is not None
    taken = names(batch)
    return taken, [i.request_id for i in scheduler.complete(batch, [True] * len(batch.images))]


def test_nothing_in_flight_schedules_nothing() -> None:
    assert make().schedule(now=0.0) is None


def test_images_are_served_in_order_of_arrival_up_to_the_width() -> None:
    scheduler = make()
    scheduler.add(image(name) for name in "abcdef")
    assert run_step(scheduler)[0] == ["a", "b", "c", "d"]


def test_a_finished_image_leaves_at_once_and_the_next_joins_at_the_next_step() -> None:
    scheduler = make()
    scheduler.add([image("short", steps=2), *(image(name, steps=4) for name in "bcde")])
    assert run_step(scheduler) == (["short", "b", "c", "d"], [])
    assert run_step(scheduler) == (["short", "b", "c", "d"], ["short"])
    assert run_step(scheduler)[0] == ["b", "c", "d", "e"]


def test_a_guided_image_takes_two_rows() -> None:
    scheduler = make()
    scheduler.add([image("a", guided=True), image("b", guided=True), image("c")])
    batch = scheduler.schedule(now=0.0)
    assert batch is not None
    assert names(batch) == ["a", "b"]
    assert batch.rows == 4


def test_an_image_that_does_not_fit_is_passed_over_until_enough_rows_are_free() -> None:
    scheduler = make()
    scheduler.add([image("a", 2), image("b", 9), image("c", 9), image("wide", 9, guided=True), image("late", 9)])
    assert run_step(scheduler)[0] == ["a", "b", "c", "late"]
    assert run_step(scheduler) == (["a", "b", "c", "late"], ["a"])
    taken, _ = run_step(scheduler)
    assert taken == ["b", "c", "wide"]  # "late" is pre-empted and keeps its slot
    assert scheduler.num_running == 4


def test_a_batch_has_the_step_of_each_image() -> None:
    scheduler = make()
    scheduler.add([image("a", 5), image("b", 6)])
    for taken in range(3):
        batch = scheduler.schedule(now=0.0)
        assert batch is not None
        assert [step.step for step in batch.steps] == [taken, taken]
        assert [step.slot for step in batch.steps] == [i.slot for i in batch.images]
        assert [step.params for step in batch.steps] == [i.params for i in batch.images]
        scheduler.complete(batch, [True, True])


def test_some_steps_are_wider_to_measure_their_cost() -> None:
    scheduler = make()
    scheduler.set_width("m", 2, trial_widths=[3, 4])
    scheduler.add([image(name, 200) for name in "abcde"])
    rows = [len(run_step(scheduler)[0]) for _ in range(4 * TRIAL_INTERVAL)]
    narrow = [2] * (TRIAL_INTERVAL - TRIAL_STEPS)
    assert rows == 2 * [*narrow, *[3] * TRIAL_STEPS, *narrow, *[4] * TRIAL_STEPS]
    assert scheduler.width("m") == 2
    scheduler.set_width("m", 2)
    assert {len(run_step(scheduler)[0]) for _ in range(TRIAL_INTERVAL)} == {2}


@pytest.mark.parametrize("trial_widths", [[5], [3, 1]])
def test_trial_widths_are_no_wider_than_the_device_and_have_room_for_guidance(trial_widths: list[int]) -> None:
    with pytest.raises(ValueError, match="the width must be between 2 and 4"):
        make().set_width("m", 2, trial_widths)


def test_models_take_turns() -> None:
    scheduler = make(models=("m", "k"))
    scheduler.add([image("a", 2), image("b", 2), image("x", 2, model="k")])
    taken = [run_step(scheduler)[0] for _ in range(4)]
    assert taken == [["a", "b"], ["x"], ["a", "b"], ["x"]]


def test_aborting_frees_slots_and_removes_waiting_images() -> None:
    scheduler = make()
    scheduler.add([image("a", 9), *(image("gone", 9) for _ in range(5)), image("z", 9)])
    run_step(scheduler)
    aborted = scheduler.abort("gone")
    assert [i.status for i in aborted] == [ImageStatus.ABORTED] * 5
    assert run_step(scheduler)[0] == ["a", "z"]
    assert scheduler.abort("gone") == []


def test_an_image_that_is_not_finite_leaves_alone() -> None:
    scheduler = make()
    scheduler.add([image("a"), image("bad"), image("c")])
    batch = scheduler.schedule(now=0.0)
    assert batch is not None
    left = scheduler.complete(batch, [True, False, True])
    assert [(i.request_id, i.status) for i in left] == [("bad", ImageStatus.FAILED)]
    assert run_step(scheduler)[0] == ["a", "c"]


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(2, 9), st.booleans()),
    st.tuples(st.just("abort"), st.integers(0, 30), st.just(False)),
    st.tuples(st.just("step"), st.integers(1, 4), st.just(False)),
)


@settings(max_examples=count(1000))
@given(st.lists(ACTIONS, max_size=40))
def test_slots_are_conserved_and_every_image_ends_once(script: list[tuple[str, int, bool]]) -> None:
    scheduler = make()
    total_slots = WIDTH * 2
    ended: list[str] = []
    added = 0

    def check_and_step() -> None:
        batch = scheduler.schedule(now=0.0)
        if batch is None:
            return
        assert 1 <= batch.rows <= WIDTH
        slots = [i.slot for i in scheduler.in_flight() if i.slot is not None and i.status is ImageStatus.RUNNING]
        assert len(set(slots)) == len(slots) <= total_slots
        assert len({step.slot for step in batch.steps}) == len(batch.images)
        ended.extend(i.request_id for i in scheduler.complete(batch, [True] * len(batch.images)))

    for action, number, guided in script:
        if action == "add":
            scheduler.add([image(str(added), number, guided)])
            added += 1
        elif action == "abort":
            ended.extend(i.request_id for i in scheduler.abort(str(number)))
        else:
            for _ in range(number):
                check_and_step()
    bound = sum(i.params.num_steps for i in scheduler.in_flight())
    for _ in range(bound):
        check_and_step()
    assert not scheduler.has_work()
    assert sorted(ended, key=int) == [str(k) for k in range(added)]


def test_a_long_image_in_a_stream_of_short_ones_is_never_held_up() -> None:
    scheduler = make()
    scheduler.add([image("long", 250)])
    steps = 0
    for k in range(10_000):
        scheduler.add([image(f"short{k}", 50)])
        steps += 1
        if "long" in run_step(scheduler)[1]:
            break
    assert steps == 250
