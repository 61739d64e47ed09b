"""The simulated fleet, against known answers: one engine alone, M/D/1 queues, and what must add up."""

from __future__ import annotations

import heapq
import math
import random
import re
import statistics
from typing import get_args

import pytest
from prometheus_client import generate_latest

from benchmarks.measured_device import ROWS_PER_S, MeasuredDevice, numbers
from benchmarks.simulate import DEVICES, Device, arrivals, step_level
from benchmarks.simulate_fleet import Load, balances, fewest_replicas, simulate
from benchmarks.simulated_fleet import Balance, FleetOutcome, Proxy, simulate_fleet
from benchmarks.traffic import Arrival
from service.engine.config import EngineConfig
from service.metrics import Metrics
from tests.paths import ROOT

PAIR = Device("one pair of images at a time", fixed=1.0, per_row=0.0, width=2)
UNLIMITED = Proxy(max_connections=10**6, queue_s=1e9)
BALANCES: tuple[Balance, ...] = get_args(Balance)


def config(device: Device, max_queue: int = 10**6) -> EngineConfig:
    return EngineConfig(max_rows=device.width, width_efficiency=1.0, max_queue=max_queue, max_wait_s=1e9)


def pairs(rate: float, count: int, steps: int = 1) -> list[Arrival]:
    """Requests that fill a step of `PAIR` each."""
    draw, at, requests = random.Random(3), 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        requests.append(Arrival(at, steps, rows=2))
    return requests


def mean_wait(requests: list[Arrival], outcome: FleetOutcome) -> float:
    """Mean of latency less the time alone."""
    latencies = [end - request.at for end, request in zip(outcome.finished, requests, strict=True)]
    return statistics.fmean(latencies) - requests[0].steps * PAIR.seconds(2)


def test_one_replica_equals_the_simulated_engine() -> None:
    device = DEVICES[1]
    requests = arrivals(device, 0.9, 60, seed=1)
    engine = step_level("srw", EngineConfig().ageing)(device, requests)
    fleet = simulate_fleet(device, 1, requests, UNLIMITED, config(device))
    assert fleet.finished == engine.finished
    assert fleet.busy_s == [engine.busy]


def test_a_replica_with_equal_requests_is_an_md1_queue() -> None:
    load = 0.5
    requests = pairs(load, 3000)
    outcome = simulate_fleet(PAIR, 1, requests, UNLIMITED, config(PAIR))
    assert mean_wait(requests, outcome) == pytest.approx(load / (2 * (1 - load)), rel=0.1)


def test_randomly_chosen_replicas_are_independent_md1_queues() -> None:
    replicas, load = 3, 0.5
    requests = pairs(replicas * load, 3000)
    outcome = simulate_fleet(PAIR, replicas, requests, Proxy(balance="random", max_connections=10**6), config(PAIR))
    assert mean_wait(requests, outcome) == pytest.approx(load / (2 * (1 - load)), rel=0.15)


@pytest.mark.parametrize("balance", [balance for balance in BALANCES if balance != "random"])
def test_with_equal_requests_every_other_balance_is_one_queue_before_all_replicas(balance: Balance) -> None:
    replicas = 3
    requests = pairs(replicas * 0.9, 300)
    free, expected = [0.0] * replicas, []
    for request in requests:
        expected.append(max(request.at, heapq.heappop(free)) + 1.0)
        heapq.heappush(free, expected[-1])
    outcome = simulate_fleet(PAIR, replicas, requests, Proxy(balance=balance, max_connections=10**6), config(PAIR))
    assert outcome.finished == pytest.approx(expected)


@pytest.mark.parametrize("balance", BALANCES)
def test_requests_that_come_one_at_a_time_take_their_time_alone(balance: Balance) -> None:
    requests = [Arrival(100.0 * number, steps=5 + number, rows=1 + number % 2) for number in range(9)]
    outcome = simulate_fleet(PAIR, 3, requests, Proxy(balance=balance))
    assert outcome.finished == [request.at + request.steps for request in requests]
    if balance != "random":  # equals take turns
        assert outcome.row_steps == [sum(request.row_steps for request in requests[first::3]) for first in range(3)]


@pytest.mark.parametrize("balance", BALANCES)
def test_no_work_is_lost_and_none_is_done_twice(balance: Balance) -> None:
    device, proxy = DEVICES[2], Proxy(balance=balance, max_connections=2, queue_s=1e9)
    requests = arrivals(device, 2.4, 80, seed=5)
    outcome = simulate_fleet(device, 3, requests, proxy, config(device))
    assert sum(outcome.row_steps) == sum(request.row_steps for request in requests)
    assert all(
        end - request.at >= 0.999 * request.steps * device.seconds(1)
        for end, request in zip(outcome.finished, requests, strict=True)
    )
    busiest, ended = max(outcome.busy_s), max(outcome.finished)
    assert busiest <= ended
    assert outcome.refusals == 0


def test_the_first_free_replica_serves_the_queue_of_the_proxy() -> None:
    requests = [Arrival(at, steps, rows=2) for at, steps in ((0.0, 100), (0.1, 5), (0.2, 7), (0.3, 9))]
    outcome = simulate_fleet(PAIR, 2, requests, Proxy(max_connections=1, queue_s=1e9))
    assert outcome.finished == pytest.approx([100.0, 5.1, 12.1, 21.1])


def test_a_request_waits_at_the_proxy_for_a_limited_time() -> None:
    requests = [Arrival(0.0, 100, rows=2), Arrival(1.0, 5, rows=2)]
    impatient = simulate_fleet(PAIR, 1, requests, Proxy(max_connections=1, queue_s=20.0), patience_s=0.0)
    assert impatient.finished == [100.0, math.inf]
    assert impatient.refusals == 1
    patient = simulate_fleet(PAIR, 1, requests, Proxy(max_connections=1, queue_s=20.0), patience_s=1000.0)
    assert patient.finished == [100.0, 105.0]
    assert patient.refusals == 3  # after 21 s, and then every 30 s and a random pause


def test_a_refused_request_is_sent_to_another_replica_and_then_comes_back_after_retry_after() -> None:
    requests = [Arrival(0.001 * number, 50, rows=2) for number in range(9)]
    full = config(PAIR, max_queue=2)
    two = simulate_fleet(PAIR, 2, requests[:4], UNLIMITED, full)
    assert (two.refusals, sorted(map(round, two.finished))) == (0, [50, 50, 100, 100])
    # All at once on one replica would overflow it: the proxy finds the other one
    crowded = simulate_fleet(PAIR, 2, requests[:4], Proxy(balance="random"), full, seed=2)
    assert crowded.refusals == 0
    late = simulate_fleet(PAIR, 2, requests, UNLIMITED, full, patience_s=1e6)
    assert late.refusals >= 5
    assert sum(late.row_steps) == sum(request.row_steps for request in requests)
    given_up = simulate_fleet(PAIR, 2, requests, UNLIMITED, full, patience_s=0.0)
    assert (given_up.refusals, given_up.finished.count(math.inf)) == (5, 5)


def test_the_proxy_is_that_of_the_configuration() -> None:
    text = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text(encoding="utf-8")
    generate = text[text.index("\nbackend generate\n") : text.index("\nbackend light\n")]
    proxy = Proxy()
    assert proxy.balance == "least-connections"
    assert "balance leastconn" in generate
    assert f"maxconn {proxy.max_connections}\n" in generate
    assert re.search(rf"timeout queue {proxy.queue_s:g}s\b", text)
    assert re.search(rf"^    retries {proxy.retries}$", text, re.MULTILINE)
    assert f"hdr Retry-After {proxy.retry_after_s:g}\n" in text


def test_the_networks_are_those_of_the_results() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    for network, rates in ROWS_PER_S.items():
        section = text[text.index(f"### {network}:") :]
        header, line = (
            next(line for line in section.splitlines() if line.startswith(start))
            for start in ("| rows/s", "| openvino:bf16")
        )
        cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
        measured = {rows: float(cells[f"batch {rows}"].split()[0]) for rows in rates}
        assert measured == rates


def test_a_batch_is_padded_to_the_next_measured_size() -> None:
    device = MeasuredDevice({1: 1.0, 4: 2.0, 8: 3.0})
    assert [device.seconds(rows) for rows in (1, 2, 4, 5, 8)] == [1.0, 2.0, 2.0, 3.0, 3.0]
    assert (device.width, device.capacity) == (8, 8 / 3)
    assert MeasuredDevice.of_ms(numbers("1=1000,4=2000,8=3000")) == device
    with pytest.raises(ValueError, match="call_s"):
        MeasuredDevice({})


def test_the_fewest_replicas_are_found() -> None:
    device = MeasuredDevice({1: 0.02, 2: 0.025, 4: 0.03})
    load = Load(rate=4.0, seconds=30.0, mix={20: 0.7, 40: 0.3}, seeds=(1, 2))
    proxy, engine = Proxy(), EngineConfig(max_rows=4)
    tried = fewest_replicas(device, load, 2.0, proxy, engine)
    enough = next(result for result in tried if result.p99 <= 2.0)
    assert simulate(device, enough.replicas - 1, load, proxy, engine).p99 > 2.0
    assert enough.replicas > load.rate * 65 / device.capacity
    assert enough.load == pytest.approx(load.rate * 65 / (enough.replicas * device.capacity))
    assert enough.load < enough.busy < 1
    with pytest.raises(ValueError, match=r"p99: 1\.2 s .* got 0\.5 s"):
        fewest_replicas(device, load, 0.5, proxy, engine)


def test_an_unknown_balance_is_refused() -> None:
    assert balances("random,least-work") == ["random", "least-work"]
    with pytest.raises(ValueError, match=r"must be of least-connections, .*; got most-work"):
        balances("most-work")


def test_a_device_is_read_from_the_metrics_of_a_replica() -> None:
    metrics = Metrics()
    for rows, seconds in ((1, 0.02), (8, 0.05), (8, 0.07)):
        metrics.step_seconds.labels("m", str(rows)).observe(seconds)
    device = MeasuredDevice.of_metrics(generate_latest(metrics.registry).decode())
    assert device.call_s == pytest.approx({1: 0.02, 8: 0.06})
    with pytest.raises(ValueError, match="needs steps of one model; got none"):
        MeasuredDevice.of_metrics(generate_latest(Metrics().registry).decode())
    metrics.step_seconds.labels("other", "1").observe(1)
    with pytest.raises(ValueError, match="got m, other"):
        MeasuredDevice.of_metrics(generate_latest(metrics.registry).decode())
