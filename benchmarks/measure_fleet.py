"""Compare the simulated fleet with a real one: replicas of the service behind HAProxy, on loopback.

    python -m benchmarks.measure_fleet --network c64 --replicas 2,3 --load 0.8 --seconds 150 --seeds 3

The replicas are processes of the whole service around a network that sleeps for c(n), so that they do not compete for
the processor; HAProxy has the configuration of deploy/haproxy, with the addresses of these replicas. After each run the
same requests are simulated (`benchmarks.simulated_fleet`), with the mean seconds of a step that the replicas measured
in this run (`iddpm_engine_step_seconds`), and with c(n) as it was given.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.contenders import Absent
from benchmarks.haproxy import haproxy
from benchmarks.measured_device import ROWS_PER_S, MeasuredDevice, numbers
from benchmarks.open_loop import OK, Answer, Ask, offer, open_client
from benchmarks.options import WORK, exit_status, say
from benchmarks.processes import end_session, free_ports
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish
from benchmarks.simulated_fleet import Proxy, simulate_fleet
from benchmarks.traffic import MIX, Arrival, draw_arrivals, mean_row_steps
from cli.load.report import percentile
from service.engine.config import EngineConfig

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0


@dataclass(frozen=True)
class Summary:
    """What clients of a fleet saw, in one run or in several."""

    latencies: tuple[float, ...]
    """Seconds."""
    seconds: float
    """From the start of the load to the last answer."""

    @classmethod
    def of(cls, requests: Sequence[Arrival], finished: Sequence[float]) -> Summary:
        """Summarise the times at which requests were answered, in seconds from the start of the load."""
        latencies = (end - request.at for end, request in zip(finished, requests, strict=True))
        return cls(tuple(latencies), max(finished))

    @classmethod
    def pooled(cls, runs: Sequence[Summary]) -> Summary:
        """Summarise the requests of several runs."""
        return cls(tuple(latency for run in runs for latency in run.latencies), sum(run.seconds for run in runs))

    @property
    def figures(self) -> tuple[float, float, float]:
        """Return the median and the 99th percentile of the latency, and the requests answered per second."""
        latencies = self.latencies
        return percentile(latencies, 0.5), percentile(latencies, 0.99), len(latencies) / self.seconds


@dataclass(frozen=True)
class Round:
    """A real run and its simulations."""

    replicas: int
    seed: int
    real: Summary
    simulated: Summary
    """With the steps as measured in the run."""
    planned: Summary
    """With the steps as they should be."""
    step_s: Mapping[int, float]
    """Measured seconds of a step by rows."""


@contextmanager
def started_fleet(device: MeasuredDevice, count: int, work: Path) -> Iterator[tuple[str, list[str]]]:
    """Start replicas and HAProxy; yield the address of the proxy and those of the replicas, when all are ready.

    Raises:
        Absent: HAProxy is not installed, or something does not become ready.
    """
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise Absent("haproxy is not installed")
    folder = work / "fleet"
    folder.mkdir(parents=True, exist_ok=True)
    first = free_ports(count)
    replicas = range(first, first + count)
    call_ms = ",".join(f"{rows}={1000 * seconds}" for rows, seconds in device.call_s.items())
    server = (sys.executable, "-m", "benchmarks.null_servers.iddpm_server")
    commands: dict[str, tuple[str, ...]] = {
        f"api-{number}": (*server, str(port), "--call-ms", call_ms) for number, port in enumerate(replicas, 1)
    }
    environment = {
        **os.environ,
        "IDDPM_ALLOWED_HOSTS": "*",
        "IDDPM_MAX_ROWS": str(device.width),
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as ending:
        for name, command in commands.items():
            log = ending.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(  # noqa: S603  # a program of this repository
                command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=environment
            )
            ending.callback(end_session, process)
        up = 'haproxy_server_status{{proxy="generate",server="api-{}",state="UP"}} 1\n'
        proxy = ending.enter_context(haproxy(program, folder, replicas))
        _until(f"{proxy.exporter}/metrics", lambda text: all(up.format(k) in text for k in range(1, count + 1)))
        yield proxy.url, [f"http://127.0.0.1:{port}" for port in replicas]


def _until(url: str, holds: Callable[[str], bool]) -> None:
    """Wait until the answer of an address fulfils a condition.

    Raises:
        Absent: it does not within `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                if holds(client.get(url).text):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise Absent(f"not all replicas were ready after {START_SECONDS:g} s; see the logs in the folder `fleet`")


def measured_steps(replicas: Sequence[str]) -> dict[int, float]:
    """Return the mean seconds of a step by padded rows, over all replicas."""
    sums, counts = defaultdict[int, float](float), defaultdict[int, float](float)
    for url in replicas:
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text):
            for sample in family.samples if family.name == "iddpm_engine_step_seconds" else ():
                if sample.name.endswith(("_sum", "_count")):
                    table = sums if sample.name.endswith("_sum") else counts
                    table[int(sample.labels["padded_rows"])] += sample.value
    return {rows: sums[rows] / counts[rows] for rows in sorted(counts) if counts[rows]}


async def send(url: str, requests: Sequence[Arrival]) -> list[Answer]:
    """Send the requests when they are due; none is sent twice."""
    async with open_client(url) as client:
        return await offer(client, requests, _ask)


def _ask(number: int, arrival: Arrival) -> Ask:
    return Ask("/v1/generate", {"n": arrival.rows, "steps": arrival.steps, "seed": number})


def measure(device: MeasuredDevice, replicas: int, requests: Sequence[Arrival], seed: int, work: Path) -> Round:
    """Measure a real fleet, and simulate it.

    Args:
        device: of each replica.
        replicas: how many there are.
        requests: those to be sent.
        seed: with which they were drawn.
        work: folder for logs.

    Raises:
        Absent: it cannot be started.
        ValueError: a request was not answered with 200.
    """
    with started_fleet(device, replicas, work) as (url, addresses):
        answers = asyncio.run(send(url, requests))
        steps = measured_steps(addresses)
    if failed := [answer.status for answer in answers if answer.status != OK]:
        raise ValueError(f"{len(failed)} of {len(answers)} requests failed, with status {sorted(set(failed))}")
    real = Summary.of(requests, [answer.ended for answer in answers])
    config = EngineConfig(max_rows=device.width)
    simulated, planned = (
        Summary.of(requests, simulate_fleet(used, replicas, requests, Proxy(), config).finished)
        for used in (MeasuredDevice({**device.call_s, **steps}), device)
    )
    return Round(replicas, seed, real, simulated, planned, steps)


def table(rounds: Sequence[Round]) -> str:
    """Return a table with a row per run, and for each number of replicas the medians of the runs and all requests."""
    columns = ("p50 s: real / simulated / with given c(n)", "p99 s", "requests/s")
    header = ("replicas", "seed", "requests", *columns, "simulated over real: p50, p99, requests/s")
    rows = [_row(run, str(run.seed)) for run in rounds]
    for replicas in sorted({run.replicas for run in rounds}):
        runs = [run for run in rounds if run.replicas == replicas]
        medians = [statistics.median(values) for values in zip(*map(_ratios, runs), strict=True)]
        rows.append((str(replicas), "median", "", "", "", "", f"**{_joined(medians)}**"))
        real, simulated, planned = (
            Summary.pooled(summaries)
            for summaries in zip(*((run.real, run.simulated, run.planned) for run in runs), strict=True)
        )
        rows.append(_row(Round(replicas, 0, real, simulated, planned, {}), "all"))
    return markdown_table(header, rows)


def _row(run: Round, name: str) -> tuple[str, ...]:
    figures = zip(*(it.figures for it in (run.real, run.simulated, run.planned)), strict=True)
    cells = (" / ".join(f"{value:.2f}" for value in values) for values in figures)
    return str(run.replicas), name, str(len(run.real.latencies)), *cells, _joined(_ratios(run))


def _ratios(run: Round) -> list[float]:
    """Return simulated over real: p50, p99, requests per second."""
    pairs = zip(run.simulated.figures, run.real.figures, strict=True)
    return [simulated / real for simulated, real in pairs]


def _joined(ratios: Sequence[float]) -> str:
    return " ".join(f"{ratio:.2f}" for ratio in ratios)


def main() -> None:
    """Print the tables, and write them as a section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=ROWS_PER_S, default="c64", help="c(n) as measured in RESULTS.md (c64)")
    parser.add_argument("--replicas", default="2,3", help="comma list (2,3)")
    parser.add_argument("--mix", type=numbers, default=MIX, metavar="STEPS=PART,...", help="(50=0.5,100=0.3,250=0.2)")
    parser.add_argument("--load", type=float, default=0.8, help="offered row-steps, relative to the capacity (0.8)")
    parser.add_argument("--seconds", type=float, default=150.0, help="in which requests arrive (150)")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (3)")
    parser.add_argument("--out", type=Path, default=WORK)
    raise SystemExit(exit_status(run, parser.parse_args()))


def run(asked: argparse.Namespace) -> None:
    """Measure what was asked for.

    Raises:
        ValueError: as `measure`.
    """
    device, facts = MeasuredDevice.of(asked.network), describe_run(torch.device("cpu"), threads=1)
    rounds = []
    for seed in range(1, asked.seeds + 1):
        for replicas in map(int, asked.replicas.split(",")):
            requests = draw_arrivals(asked.load * replicas * device.capacity, asked.seconds, seed, asked.mix)
            rounds.append(measure(device, replicas, requests, seed, asked.out))
            say(" | ".join(_row(rounds[-1], str(seed))))
    facts["Mean requests"] = (
        f"{mean_row_steps(asked.mix):g} row-steps; load {asked.load:g}, {asked.seconds:g} s of arrivals"
    )
    steps = [_ms(rounds[0].step_s), _ms(device.call_s)]
    facts["Step in the first run, and as given"] = "; ".join(steps)
    section = markdown_section(facts, table(rounds), "benchmarks.measure_fleet")
    publish(asked.out, "fleet", section)


def _ms(seconds: Mapping[int, float]) -> str:
    return ", ".join(f"c({rows}) = {1000 * value:.1f} ms" for rows, value in seconds.items())


if __name__ == "__main__":
    main()
