"""Say how many replicas a load needs, or what a number of replicas gives, by simulation (`benchmarks.simulated_fleet`).

    python -m benchmarks.simulate_fleet --network c64 --rate 10 --p99 15          # the fewest replicas
    python -m benchmarks.simulate_fleet --network c64 --rate 10 --replicas 25,30  # what these give
    python -m benchmarks.simulate_fleet --replica http://127.0.0.1:8000 --rate 10 --p99 15
    python -m benchmarks.simulate_fleet --call-ms 1=5.5,2=6.9,4=10.4,8=14 --rate 10 --p99 15 --mix 10=0.8,50=0.2

Requests arrive as a Poisson process, independently of earlier ones, with 1 to 4 images each and numbers of steps drawn
from the mixture. Latency is from the first attempt to the answer; a request that was refused until its client gave up
counts as infinitely late. The requests of the first fifth are not counted, because the replicas start empty. A row is
the median of several seeds.

c(n) is all of a step: take it from a replica that has run steps of every size (`--replica`). The networks of
`--network` are those of "One network call" in RESULTS.md, on OpenVINO in bfloat16 and the two cores of that machine,
without what a step needs besides the network.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import httpx

from benchmarks.measured_device import ROWS_PER_S, MeasuredDevice, numbers
from benchmarks.reporting import command_line, markdown_table
from benchmarks.simulated_fleet import Balance, Proxy, SteppedDevice, simulate_fleet
from benchmarks.traffic import MAX_IMAGES, MIX, Arrival, draw_arrivals, mean_row_steps
from cli.load.report import percentile
from service.engine.config import EngineConfig

WARM_UP = 0.2
"""Part of the simulated time whose requests are not counted."""


@dataclass(frozen=True)
class Load:
    """What is asked of the fleet."""

    rate: float
    """Requests per second."""
    seconds: float
    mix: Mapping[int, float]
    """Probability of each number of steps."""
    seeds: Sequence[int]

    def requests(self, seed: int) -> list[Arrival]:
        """Draw the requests."""
        return draw_arrivals(self.rate * mean_row_steps(self.mix), self.seconds, seed, self.mix)


@dataclass(frozen=True)
class Result:
    """What a number of replicas gives; medians over the seeds."""

    replicas: int
    load: float
    """Offered row-steps, relative to the capacity of all replicas at full width."""
    p50: float
    p95: float
    p99: float
    """Seconds."""
    p99_range: tuple[float, float]
    """Over the seeds."""
    busy: float
    """Part of the time until the last answer in which a replica computes, mean over the replicas. It exceeds the load,
    because narrower steps are less efficient."""
    refused: float
    """Part of the requests whose client gave up."""


def simulate(device: SteppedDevice, replicas: int, load: Load, proxy: Proxy, config: EngineConfig) -> Result:
    """Return what a number of replicas gives."""
    runs = []
    for seed in load.seeds:
        requests = load.requests(seed)
        outcome = simulate_fleet(device, replicas, requests, proxy, config, seed=seed)
        counted = [
            finished - request.at
            for request, finished in zip(requests, outcome.finished, strict=True)
            if request.at >= WARM_UP * load.seconds
        ]
        ended = max((at for at in outcome.finished if at < math.inf), default=load.seconds)
        runs.append(
            (
                *(percentile(counted, part) for part in (0.5, 0.95, 0.99)),
                sum(outcome.busy_s) / (replicas * ended),
                sum(at == math.inf for at in outcome.finished) / len(requests),
            )
        )
    p50, p95, p99, busy, refused = (statistics.median(values) for values in zip(*runs, strict=True))
    spread = [run[2] for run in runs]
    offered = load.rate * mean_row_steps(load.mix) / (replicas * device.capacity)
    return Result(replicas, offered, p50, p95, p99, (min(spread), max(spread)), busy, refused)


def fewest_replicas(
    device: MeasuredDevice, load: Load, p99_s: float, proxy: Proxy, config: EngineConfig
) -> list[Result]:
    """Find the fewest replicas whose p99 is at most `p99_s`, assuming that more replicas are never slower.

    Returns:
        The results of all numbers that were tried, in ascending order; the one that was asked for is the first whose
        `p99` is at most `p99_s`.

    Raises:
        ValueError: even without any waiting, more than one request in a hundred takes longer.
    """
    alone = percentile((request.steps * device.seconds(request.rows) for request in load.requests(load.seeds[0])), 0.99)
    if alone > p99_s:
        raise ValueError(f"p99: {alone:.3g} s is the 99th percentile of requests without any waiting; got {p99_s:g} s")
    tried: dict[int, Result] = {}

    def suffices(replicas: int) -> bool:
        tried[replicas] = simulate(device, replicas, load, proxy, config)
        return tried[replicas].p99 <= p99_s

    too_few = math.ceil(load.rate * mean_row_steps(load.mix) / device.capacity) - 1
    more = 1
    while not suffices(too_few + more):
        too_few, more = too_few + more, 2 * more
    enough = too_few + more
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if suffices(middle) else (middle, enough)
    return [tried[replicas] for replicas in sorted(tried)]


def table(results: Sequence[Result]) -> str:
    """Return a table with one row per number of replicas."""
    header = ("replicas", "load", "p50 s", "p95 s", "p99 s", "p99 s, least to greatest seed", "busy", "refused")
    return markdown_table(
        header,
        [
            (
                str(result.replicas),
                f"{result.load:.2f}",
                *(f"{value:.2f}" for value in (result.p50, result.p95, result.p99)),
                "{:.2f}-{:.2f}".format(*result.p99_range),
                f"{result.busy:.2f}",
                f"{result.refused:.3f}",
            )
            for result in results
        ],
    )


def balances(text: str) -> list[Balance]:
    """Parse a list of ways to balance.

    Raises:
        ValueError: one of them does not exist.
    """
    known: dict[str, Balance] = {balance: balance for balance in get_args(Balance)}
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"must be of {', '.join(known)}; got {', '.join(unknown)}")
    return [known[name] for name in names]


def main() -> None:
    """Print what the replicas give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--network", choices=ROWS_PER_S, help="c(n) as measured in RESULTS.md")
    device.add_argument("--replica", metavar="URL", help="c(n) as a replica measured it: iddpm_engine_step_seconds")
    device.add_argument("--call-ms", type=numbers, metavar="ROWS=MS,...", help="c(n) in milliseconds")
    parser.add_argument("--rate", type=float, required=True, help="requests per second, in sum")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--p99", type=float, metavar="SECONDS", help="find the fewest replicas with this p99 latency")
    wanted.add_argument("--replicas", metavar="N,...", help="say what these give")
    parser.add_argument("--mix", type=numbers, default=MIX, metavar="STEPS=PART,...", help="(50=0.5,100=0.3,250=0.2)")
    parser.add_argument(
        "--balance", type=balances, default="least-connections", help=f"comma list of {', '.join(get_args(Balance))}"
    )
    parser.add_argument("--max-connections", type=int, default=Proxy().max_connections, help="of a replica (32)")
    parser.add_argument("--max-queue", type=int, default=EngineConfig().max_queue, help="IDDPM_MAX_QUEUE (256)")
    parser.add_argument("--seconds", type=float, help="simulated time (2,000 requests, at least 20 long ones)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    asked = parser.parse_args()
    if asked.replica:
        simulated = MeasuredDevice.of_metrics(httpx.get(f"{asked.replica}/metrics").raise_for_status().text)
    else:
        simulated = MeasuredDevice.of(asked.network) if asked.network else MeasuredDevice.of_ms(asked.call_ms)
    longest_s = max(asked.mix) * simulated.seconds(min(MAX_IMAGES, simulated.width))
    seconds = asked.seconds or max(2000 / asked.rate, 20 * longest_s)
    load = Load(asked.rate, seconds, asked.mix, range(asked.seeds))
    config = EngineConfig(max_rows=simulated.width, max_queue=asked.max_queue)
    offered = asked.rate * mean_row_steps(asked.mix)
    calls = ", ".join(f"c({rows}) = {1000 * s:.1f} ms" for rows, s in simulated.call_s.items())
    print(f"{command_line('benchmarks.simulate_fleet')}\n")
    print(f"{calls}: {simulated.capacity:.0f} row-steps/s per replica. Offered: {offered:.0f} row-steps/s,")
    print(f"{offered / simulated.capacity:.1f} replicas without any waiting; {seconds:.0f} s, {asked.seeds} seeds.")
    for balance in asked.balance:
        proxy = Proxy(balance=balance, max_connections=asked.max_connections)
        if asked.p99 is None:
            counts = sorted(map(int, asked.replicas.split(",")))
            results = [simulate(simulated, count, load, proxy, config) for count in counts]
        else:
            results = fewest_replicas(simulated, load, asked.p99, proxy, config)
        print(f"\n{balance}\n\n{table(results)}")
        if asked.p99 is not None:
            enough = next(result for result in results if result.p99 <= asked.p99)
            print(f"\n{enough.replicas} replicas: p99 {enough.p99:.2f} s, at most {asked.p99:g} s.", flush=True)


if __name__ == "__main__":
    main()
