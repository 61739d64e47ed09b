"""Predictions are exact if nothing happens that they do not model, and close in the simulation, where it does."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.simulate import DEVICES, Arrival, Device, Outcome, arrivals, best_batcher, latencies, step_level
from cli.load.report import percentile
from service.engine.config import EngineConfig
from service.engine.forecast import Forecast
from service.engine.ledger import Ledger
from service.engine.policies import PolicyName
from service.engine.request import Image, ImageParams, Priority
from service.engine.scheduler import Scheduler
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts
from tests.fakes import generation, params

WIDTH = 4
EVERY_POLICY = pytest.mark.parametrize("policy", ["fifo", "srw", "deadline"])


class Device4:
    """A scheduler, its forecast, and a step that takes a second for any number of rows."""

    def __init__(self, policy: PolicyName = "fifo", **changes: float) -> None:
        config = EngineConfig(policy=policy).replace(max_rows=WIDTH, **changes)
        self.scheduler, self.ledger, self.costs = Scheduler(config, ["m"]), Ledger(["m"]), StepCosts()
        self.forecast = Forecast(config, self.ledger)
        self.costs.observe(WIDTH, 1.0)
        self.now = 0.0
        self.finished: dict[str, float] = {}

    def snapshot(self) -> Snapshot:
        steps, width = self.scheduler.steps("m"), self.scheduler.width("m")
        return Snapshot.of(self.scheduler.started(), {"m": steps}, {"m": width}, {"m": self.costs.now})

    def add(self, name: str, *images: ImageParams, priority: Priority = Priority.INTERACTIVE) -> tuple[float, float]:
        """Accept a request; return its predicted wait and finish, from now."""
        request = generation(name, *images, priority=priority)
        accepted = self.scheduler.order.images_of(request, self.now, self.scheduler.all_steps())
        predicted = self.forecast.predict(accepted, self.snapshot())
        self.ledger.add(accepted)
        self.scheduler.add(accepted)
        return predicted.wait_s, predicted.finish_s

    def step(self) -> list[Image]:
        batch = self.scheduler.schedule(self.now)
        assert batch is not None
        self.now += 1.0
        left = self.scheduler.complete(batch, [True] * len(batch.images))
        for image in left:
            self.ledger.remove(image.request_id, image.position)
            self.finished[image.request_id] = self.now
        return left

    def run(self) -> None:
        while self.scheduler.has_work():
            self.step()


@EVERY_POLICY
def test_on_an_idle_device_a_request_takes_the_time_of_its_steps(policy: PolicyName) -> None:
    assert Device4(policy).add("r", params(50), params(50)) == (0.0, 50.0)


@EVERY_POLICY
def test_equal_images_in_a_queue_finish_when_predicted(policy: PolicyName) -> None:
    device = Device4(policy)
    predicted = {}
    for k in range(40):
        predicted[str(k)] = device.add(str(k), params(20))[1]
    device.run()
    for name, at in device.finished.items():
        assert predicted[name] == pytest.approx(at, abs=20)  # whole rounds of the width
    assert statistics.fmean(predicted.values()) == pytest.approx(statistics.fmean(device.finished.values()), rel=0.1)


@EVERY_POLICY
def test_a_request_of_many_images_finishes_with_its_last(policy: PolicyName) -> None:
    device = Device4(policy)
    wait, finish = device.add("r", *[params(20)] * 12)
    device.run()
    assert wait == 0.0
    assert finish == pytest.approx(device.finished["r"], abs=15)


def test_short_work_is_predicted_to_go_before_long_work_under_srw_only() -> None:
    predicted = {}
    policies: tuple[PolicyName, ...] = ("fifo", "srw")
    for policy in policies:
        device = Device4(policy)
        device.add("long", *[params(250)] * 8)
        predicted[policy] = device.add("short", params(10))[1]
        device.run()
        assert predicted[policy] == pytest.approx(device.finished["short"], rel=0.05)
    assert predicted["srw"] == 10


@pytest.mark.parametrize("started", range(1, 4))
def test_an_image_waits_for_those_that_will_take_the_free_rows(started: int) -> None:
    device = Device4()
    for k in range(started):
        device.add(f"started{k}", params(100))
    device.step()
    for k in range(3 - started):
        device.add(f"waiting{k}", params(100))
    assert device.add("last", params(200)) == (0.0, 200.0)
    assert device.add("later", params(10)) == (99.0, 109.0)
    device.run()
    assert device.finished["later"] == 110.0


def test_completed_steps_reduce_the_prediction() -> None:
    device = Device4()
    device.add("a", *[params(100)] * 4)
    for _ in range(90):
        device.step()
    assert device.forecast.backlog_s(device.snapshot()) == 10.0
    for k in range(8):
        finish = device.add(f"b{k}", params(20))[1]
    began = device.now
    device.run()
    assert finish == pytest.approx(device.finished["b7"] - began, abs=10)


def test_batch_work_waits_for_interactive_work_or_takes_its_share() -> None:
    device = Device4(batch_share=0.25)
    device.add("i", *[params(100)] * 40)
    _, finish = device.add("b", *[params(20)] * 4, priority=Priority.BATCH)
    device.run()
    assert finish == pytest.approx(device.finished["b"], rel=0.25)


def test_batch_work_below_its_share_takes_its_own_steps_at_the_shares_rate() -> None:
    device = Device4(batch_share=0.25)
    device.add("i", *[params(100)] * 40)
    _, finish = device.add("b", params(50, cfg_scale=2.0), priority=Priority.BATCH)
    device.run()
    assert finish == pytest.approx(device.finished["b"], abs=2)
    assert finish > 50


def test_completed_steps_of_evicted_images_count() -> None:
    device = Device4("srw", ageing=0.01, slots_per_row=1)
    device.add("long", *[params(250)] * 4)
    for _ in range(100):
        device.step()
    device.add("short", *[params(10)] * 4)
    device.step()
    assert device.scheduler.num_evicted == 4
    assert device.forecast.backlog_s(device.snapshot()) == 150 + 9


def test_an_eta_shrinks_with_every_step_and_ends() -> None:
    device = Device4("srw")
    device.add("a", params(10), params(10))
    device.add("b", *[params(30)] * 4)
    seen = []
    while (eta := device.forecast.eta("b", device.snapshot())) is not None:
        seen.append((eta.position, eta.finish_s))
        device.step()
    assert seen == sorted(seen, reverse=True)
    assert seen[0][0] == 2
    assert seen[-1] == (0, 1.0)


def test_nothing_is_predicted_before_a_step_was_timed() -> None:
    device = Device4()
    device.costs = StepCosts()
    assert device.add("r", params(50)) == (0.0, 0.0)


def simulated(device: Device, policy: PolicyName) -> tuple[list[Arrival], Outcome]:
    requests = arrivals(device, 0.8, 400, seed=1)
    return requests, step_level(policy, EngineConfig().ageing)(device, requests)


def test_in_the_simulation_half_of_all_predictions_are_within_a_quarter() -> None:
    _, outcome = simulated(DEVICES[0], "srw")
    assert statistics.median(outcome.ratios) == pytest.approx(1.0, abs=0.1)
    within = sum(0.75 <= ratio <= 1.25 for ratio in outcome.ratios) / len(outcome.ratios)
    assert within >= 0.5


def test_at_load_08_joining_at_any_step_beats_batching_requests() -> None:
    device = DEVICES[0]
    requests, outcome = simulated(device, EngineConfig().policy)
    ours, theirs = latencies(requests, outcome), latencies(requests, best_batcher(device, requests))
    assert statistics.fmean(ours) <= 0.6 * statistics.fmean(theirs)
    assert percentile(ours, 0.99) <= percentile(theirs, 0.99)
