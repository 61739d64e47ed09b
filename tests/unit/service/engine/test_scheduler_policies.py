"""Policies, priorities, fairness and eviction of the scheduler alone: no model, no clock; time is counted in steps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.config import EngineConfig
from service.engine.policies import PATIENCE_S, PolicyName
from service.engine.request import Image, ImageStatus, Priority, StepBatch
from service.engine.scheduler import Scheduler
from tests.arriving import ArrivingScheduler
from tests.counts import count
from tests.fakes import CountingRunner, generation, params

WIDTH = 4
EVERY_POLICY = pytest.mark.parametrize("policy", ["fifo", "srw", "deadline"])
POLICY_NAMES = st.sampled_from(["fifo", "srw", "deadline"])


def make(policy: PolicyName = "srw", **changes: float) -> Scheduler:
    sizes = {"max_rows": WIDTH, "slots_per_row": 2, **changes}
    return ArrivingScheduler(EngineConfig(policy=policy).replace(**sizes), ["m"])


def image(
    name: str,
    steps: int = 3,
    guided: bool = False,
    client: str = "",
    priority: Priority = Priority.INTERACTIVE,
    deadline_s: float | None = None,
    submitted_at: float = 0.0,
) -> Image:
    wanted = params(steps, 2.0 if guided else 1.0)
    request = generation(name, wanted, client=client, priority=priority, deadline_s=deadline_s)
    return Image(request=request, position=0, submitted_at=submitted_at)


class Driver:
    """Takes steps, carries out slot changes on a runner, and checks the invariants at every step."""

    def __init__(self, scheduler: Scheduler, num_slots: int = WIDTH * 2) -> None:
        self.scheduler = scheduler
        self.num_slots = num_slots
        self.runner = CountingRunner()
        self.saved: dict[Image, object] = {}
        self.ended: list[Image] = []
        self.served: Counter[str] = Counter()

    def step(self, ok: Callable[[Image], bool] = lambda image: True) -> list[str]:
        """Take a step; return the names of images that took it."""
        batch = self.scheduler.schedule(now=1.0)
        if batch is None:
            return []
        self.carry_out(batch)
        assert 1 <= batch.rows <= self.scheduler.width("m")
        held = [image.slot for image in self.scheduler.running()]
        assert len(set(held)) == len(held) <= self.num_slots
        slots = [step.slot for step in batch.steps]
        assert len(set(slots)) == len(batch.images) == len(set(batch.images))
        self.runner.step(slots)
        for picked in batch.images:
            assert picked.slot is not None
            assert self.runner.steps[picked.slot] == picked.steps_done + 1  # no step lost or repeated by an eviction
            self.served[picked.client] += picked.rows
        self.ended += self.scheduler.complete(batch, [ok(picked) for picked in batch.images])
        return [picked.request_id for picked in batch.images]

    def carry_out(self, batch: StepBatch) -> None:
        for move, state in zip(batch.evictions, self.runner.evict([m.slot for m in batch.evictions]), strict=True):
            self.saved[move.image] = state
        self.runner.restore([m.slot for m in batch.restores], [self.saved.pop(m.image) for m in batch.restores])
        self.runner.start([step for step in batch.steps if step.step == 0])

    def finish(self) -> None:
        for _ in range(sum(image.remaining_row_steps for image in self.scheduler.in_flight())):
            self.step()
        assert not self.scheduler.has_work()


IMAGES = st.tuples(
    st.integers(2, 12),
    st.booleans(),
    st.sampled_from(["", "a", "b", "c"]),
    st.sampled_from(Priority),
    st.one_of(st.none(), st.floats(0, 50)),
)
SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), IMAGES),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("fail"), st.integers(0, 3)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("width"), st.integers(2, WIDTH)),
    ),
    max_size=60,
)


@settings(max_examples=count(2000))
@given(SCRIPTS, POLICY_NAMES, st.integers(1, 2))
def test_no_row_leaks_and_every_image_ends_once(
    script: list[tuple[str, object]], policy: PolicyName, slots_per_row: int
) -> None:
    scheduler = make(policy, slots_per_row=slots_per_row, client_allowance=5)
    driver = Driver(scheduler, WIDTH * slots_per_row)
    added = 0
    for action, argument in script:
        if action == "add" and isinstance(argument, tuple):
            scheduler.add([image(str(added), *argument)])
            added += 1
        elif action == "abort":
            driver.ended += scheduler.abort(str(argument))
        elif action == "fail":
            driver.step(ok=lambda picked, n=argument: picked.sequence % 4 != n)  # type: ignore[misc]
        elif action == "width" and isinstance(argument, int):
            scheduler.set_width("m", argument)
        elif isinstance(argument, int):
            for _ in range(argument):
                driver.step()
        in_flight = scheduler.in_flight()
        assert scheduler.remaining_row_steps == sum(i.remaining_row_steps for i in in_flight)
        assert len(in_flight) == scheduler.num_waiting + scheduler.num_running + scheduler.num_evicted
    driver.finish()
    assert sorted(int(i.request_id) for i in driver.ended) == list(range(added))
    assert scheduler.num_running == scheduler.num_waiting == scheduler.num_evicted == 0
    assert scheduler.remaining_row_steps == 0
    assert scheduler.free_slots("m") == list(range(WIDTH * slots_per_row))
    for ended in driver.ended:
        if ended.status is ImageStatus.DONE:
            assert ended.steps_done == ended.params.num_steps


def may_go_first(policy: PolicyName, later: Image, earlier: Image, work_left: int, ageing: float) -> bool:
    """Return whether the policy's stated bound allows a later image to overtake."""
    if policy == "fifo":
        return False
    if policy == "srw":
        return later.arrival_step <= earlier.arrival_step + work_left / ageing
    due = earlier.submitted_at + PATIENCE_S if earlier.deadline is None else earlier.deadline
    return later.submitted_at <= due


@settings(max_examples=count(1000))
@given(st.lists(st.tuples(st.integers(0, 3), IMAGES), min_size=2, max_size=40), POLICY_NAMES)
def test_no_image_is_overtaken_beyond_the_stated_bound(
    arrivals: list[tuple[int, tuple[int, bool, str, Priority, float | None]]], policy: PolicyName
) -> None:
    scheduler = make(policy, ageing=2.0)
    driver = Driver(scheduler)

    def checked_step() -> None:
        in_flight = scheduler.in_flight()
        work_left = {i: i.remaining_row_steps for i in in_flight}
        picked = set(driver.step())
        for earlier in in_flight:
            if earlier.request_id in picked:
                continue
            beyond = [
                later
                for later in in_flight
                if later.request_id in picked
                and later.priority is earlier.priority
                and later.sequence > earlier.sequence
                and not may_go_first(policy, later, earlier, work_left[earlier], 2.0)
            ]
            # Only into a last row, in which two do not fit
            assert sum(later.rows for later in beyond) <= (0 if earlier.rows == 1 else 1)

    for number, (steps, (length, guided, _, priority, deadline)) in enumerate(arrivals):
        now = float(scheduler.steps("m"))
        scheduler.add([image(str(number), length, guided, f"client {number}", priority, deadline, now)])
        for _ in range(steps):
            checked_step()
    while scheduler.has_work():
        checked_step()


STEP_S = 1.0
"""The time of a step, for policies that use times: so long that patience ends during the test."""


@EVERY_POLICY
@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("streams", [1, 2], ids=["one stream", "a stream of each priority"])
def test_a_long_image_in_an_endless_stream_of_short_ones_finishes_within_the_bound(
    policy: PolicyName, priority: Priority, streams: int
) -> None:
    """Closed loop: 2 W short images of its priority are always in flight, and the same number of the other one.

    Before the long image, the scheduler takes the images that may overtake it under the policy, and those in flight
    when no image may overtake it any more. Both are processed at the rate of their priority, which may owe the image a
    step's worth and 2 rows.
    """
    scheduler = make(policy, slots_per_row=4)
    driver = Driver(scheduler, WIDTH * 4)
    long = image("long", 250, priority=priority)
    scheduler.add([long])

    config = EngineConfig()
    overtaken = {"fifo": 0.0, "srw": 250 / config.ageing, "deadline": PATIENCE_S / STEP_S}[policy]
    share = {Priority.INTERACTIVE: 1 - config.batch_share, Priority.BATCH: config.batch_share}[priority]
    rate = WIDTH if streams == 1 else share * WIDTH
    bound = overtaken + (2 * WIDTH * 50 + share * WIDTH + 2) / rate + 250 / min(1, rate)

    names = map(str, itertools.count())
    while long not in driver.ended:
        for other in [priority] if streams == 1 else Priority:
            short = sum(i.priority is other for i in scheduler.in_flight() if i is not long)
            for name in itertools.islice(names, 2 * WIDTH - short):
                now = scheduler.steps("m") * STEP_S
                new = image(name, 50, priority=other, deadline_s=0.0, submitted_at=now)  # the earliest deadline
                scheduler.add([new])
        driver.step()
        assert scheduler.steps("m") <= bound
    if policy != "fifo":
        assert scheduler.steps("m") > 250 / min(1, rate)  # it was overtaken: the bound was tested


def test_shortest_remaining_work_goes_first_and_waiting_compensates_for_work() -> None:
    scheduler = make(ageing=1.0)
    driver = Driver(scheduler)
    scheduler.add([image("long", 40), *(image(f"medium {k}", 20) for k in range(4))])
    assert "long" not in driver.step()
    for _ in range(19):
        driver.step()
    scheduler.add([image(f"new {k}", 21) for k in range(4)])  # 20 steps later, 19 row-steps shorter
    assert driver.step()[0] == "long"


def test_the_earliest_deadline_goes_first_and_no_deadline_counts_as_a_late_one() -> None:
    driver = Driver(make("deadline"))
    driver.scheduler.add([image("none", 9), image("far", 9, deadline_s=PATIENCE_S + 1)])
    driver.scheduler.add([image(f"near {k}", 9, deadline_s=5.0 - k) for k in range(4)])
    assert driver.step() == ["near 3", "near 2", "near 1", "near 0"]
    for _ in range(8):
        driver.step()
    assert driver.step() == ["none", "far"]


@EVERY_POLICY
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.125, 0.5])
def test_batch_work_gets_its_share_and_unused_rows(policy: PolicyName, guided: bool, share: float) -> None:
    scheduler = make(policy, batch_share=share)
    driver = Driver(scheduler)
    steps = 400
    batch = [image(f"b{k}", 50, guided, "b", Priority.BATCH, deadline_s=1000.0) for k in range(80)]
    scheduler.add(batch)
    scheduler.add([image(f"i{k}", 20, client="i", deadline_s=0.0) for k in range(100)])
    for step in range(1, steps + 1):
        driver.step()
        assert driver.served["b"] >= share * WIDTH * step - (share * WIDTH + 2)
        assert driver.served["b"] <= share * WIDTH * step + 2
        assert driver.served["b"] + driver.served["i"] >= step * (WIDTH - 1)
    while any(i.priority is Priority.INTERACTIVE for i in scheduler.in_flight()):
        driver.step()
    before = driver.served["b"]
    driver.step()
    assert driver.served["b"] - before == WIDTH


@EVERY_POLICY
def test_a_client_with_a_thousand_images_does_not_starve_one_with_one(policy: PolicyName) -> None:
    allowance = 100
    scheduler = make(policy, client_allowance=allowance)
    driver = Driver(scheduler)
    scheduler.add([image(f"crowd {k}", 50, client="crowd") for k in range(1000)])
    for _ in range(500):
        driver.step()
    scheduler.add([image("alone", 50, client="alone")])
    # The other client may continue until it is `allowance` ahead: it gains half of each step's rows over an equal part
    for _ in range(2 * allowance // WIDTH + 1 + 50):
        driver.step()
    assert "alone" in [ended.request_id for ended in driver.ended]


@EVERY_POLICY
@pytest.mark.parametrize("width", [2, WIDTH])
def test_clients_with_a_backlog_get_equal_parts_even_if_they_outnumber_rows(policy: PolicyName, width: int) -> None:
    """No client is further ahead than the allowance, so none is further behind than the allowances of all others."""
    allowance = 60
    scheduler = make(policy, client_allowance=allowance)
    scheduler.set_width("m", width)
    driver = Driver(scheduler)
    clients = ["a", "b", "c", "d", "e"]
    for client, images in zip(clients, (400, 200, 100, 100, 100), strict=True):
        scheduler.add([image(f"{client}{k}", 30, client=client) for k in range(images)])
    for _ in range(1500):
        driver.step()
    parts = [driver.served[client] for client in clients]
    assert sum(parts) == 1500 * width
    fair = 1500 * width / len(clients)
    assert max(parts) <= fair + allowance + width
    assert min(parts) >= fair - (len(clients) - 1) * (allowance + width)


def test_unused_rows_go_to_clients_that_are_ahead() -> None:
    scheduler = make(client_allowance=10)
    driver = Driver(scheduler)
    scheduler.add([image(f"crowd {k}", 50, client="crowd") for k in range(100)])
    scheduler.add([image("alone", 250, client="alone")])
    for _ in range(100):
        assert len(driver.step()) == WIDTH
    assert driver.served["alone"] >= 90


def test_without_a_free_slot_the_least_urgent_image_is_evicted_and_restored() -> None:
    scheduler = make(slots_per_row=1)
    driver = Driver(scheduler, WIDTH)
    scheduler.add([image(f"long {k}", 30 + k) for k in range(4)])
    driver.step()
    scheduler.add([image("short", 5)])
    batch = scheduler.schedule(now=2.0)
    assert batch is not None
    starts = [step.slot for step in batch.steps if step.step == 0]
    assert [(move.image.request_id, [move.slot] == starts) for move in batch.evictions] == [("long 3", True)]
    assert batch.preempted == 1
    assert (scheduler.num_running, scheduler.num_evicted, scheduler.num_waiting) == (4, 1, 0)
    driver.carry_out(batch)
    driver.runner.step([step.slot for step in batch.steps])
    scheduler.complete(batch, [True] * 4)
    for _ in range(5):
        driver.step()
    assert scheduler.num_evicted == 0
    driver.finish()
    assert len(driver.ended) == 5


def test_aborting_an_evicted_image_frees_its_capacity() -> None:
    scheduler = make(slots_per_row=1)
    driver = Driver(scheduler, WIDTH)
    scheduler.add([image(f"long {k}", 30) for k in range(4)])
    driver.step()
    scheduler.add([image("short", 5)])
    driver.step()
    for k in range(4):
        scheduler.abort(f"long {k}")
    scheduler.add([image("other", 28)])
    assert "other" in driver.step()


def test_the_width_stays_within_its_limits() -> None:
    scheduler = make()
    for width in (1, WIDTH + 1):
        with pytest.raises(ValueError, match="the width must be between 2 and 4"):
            scheduler.set_width("m", width)
    scheduler.set_width("m", 2)
    driver = Driver(scheduler)
    scheduler.add([image(name) for name in "abcd"])
    assert driver.step() == ["a", "b"]
