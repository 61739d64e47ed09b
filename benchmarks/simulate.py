"""Simulate step-level batching and its policies with the real scheduler, a virtual clock and no model.

    python -m benchmarks.simulate --loads 0.5,0.8,0.95 --requests 2000

Open loop: requests arrive as a Poisson process, independently of earlier ones; 50, 100 or 250 steps with
probability .5, .3, .2; 1 to 4 images each, each from a different client. A step of n rows takes c(n), in units of a
call with one row. Load is offered row-steps per unit of time over W / c(W), the device's rate at full width. Compared:

- the scheduler of the service with each policy;
- a request-level dynamic batcher: requests with equal numbers of steps run together, up to W rows, from first step to
  last; it waits up to a delay for further requests, and uses the delay and width with the lowest mean;
- one request at a time, its images together.

Latency is from arrival to the last image of the request. Slowdown is latency over the time of the request alone.
Goodput is row-steps of requests with a slowdown of at most `SLO`, over the device's capacity until the last arrival. A
quarter of the requests have a deadline of 4 times their time alone (none is refused); `late` is the fraction of
them that miss it. `ratio` is actual over predicted time to finish, as predicted on arrival: 10th, 50th, 90th
percentile.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks import traffic
from benchmarks.traffic import MIX, SLO, draw_arrival, mean_row_steps
from cli.load.report import percentile
from service.engine.config import EngineConfig
from service.engine.forecast import Forecast
from service.engine.ledger import Ledger
from service.engine.policies import PolicyName
from service.engine.request import GenerationRequest, ImageParams, PlanKey
from service.engine.scheduler import Scheduler
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts

HURRIED, HURRY = 0.25, 4.0
UNIT_S = 0.02
"""Seconds of a call with one row, the unit of default deadlines."""
DELAYS = (0.0, 10.0, 50.0, 200.0)
MODEL = "m"


@dataclass(frozen=True)
class Device:
    """A step of n rows takes fixed + per_row * n."""

    name: str
    fixed: float
    per_row: float
    width: int

    def seconds(self, rows: int) -> float:
        return self.fixed + self.per_row * rows

    @property
    def capacity(self) -> float:
        """Row-steps per unit of time at full width."""
        return self.width / self.seconds(self.width)


DEVICES = (Device("GPU-like", 0.95, 0.05, 32), Device("middling", 0.8, 0.2, 16), Device("CPU-like", 0.05, 0.95, 4))


@dataclass(frozen=True)
class Arrival(traffic.Arrival):
    """A request that may have a deadline."""

    patience: float | None
    """Deadline after its arrival; None: no deadline."""


@dataclass
class Outcome:
    """Results of a server for the arrivals."""

    finished: list[float]
    busy: float
    ratios: list[float] = field(default_factory=list)


Server = Callable[[Device, Sequence[Arrival]], Outcome]


def arrivals(device: Device, load: float, count: int, seed: int) -> list[Arrival]:
    """Draw random requests that offer this load."""
    draw = random.Random(seed)  # noqa: S311  # nothing secret
    rate = load * device.capacity / mean_row_steps()
    at, requests = 0.0, []
    for _ in range(count):
        drawn = draw_arrival(draw, at, rate)
        at = drawn.at
        hurried = draw.random() < HURRIED
        patience = HURRY * drawn.steps * device.seconds(drawn.rows) if hurried else None
        requests.append(Arrival(at, drawn.steps, drawn.rows, patience))
    return requests


def step_level(policy: PolicyName, ageing: float) -> Server:
    """Return the scheduler of the service as a server."""

    def serve(device: Device, requests: Sequence[Arrival]) -> Outcome:
        config = EngineConfig(max_rows=device.width, policy=policy, ageing=ageing)
        scheduler, ledger, costs = Scheduler(config, [MODEL]), Ledger([MODEL]), StepCosts()
        forecast = Forecast(config, ledger)
        for rows in range(1, device.width + 1):
            costs.observe(rows, device.seconds(rows))
        outcome = Outcome([0.0] * len(requests), 0.0)
        predicted = [0.0] * len(requests)
        coming = deque(enumerate(requests))
        now = 0.0
        while coming or scheduler.has_work():
            if not scheduler.has_work():
                now = max(now, coming[0][1].at)
            while coming and coming[0][1].at <= now:
                number, arrival = coming.popleft()
                request, steps = as_request(number, arrival), scheduler.all_steps()
                images = scheduler.order.images_of(request, arrival.at * UNIT_S, steps)
                snapshot = Snapshot.of(
                    scheduler.started(),
                    steps=steps,
                    widths={MODEL: scheduler.width(MODEL)},
                    costs={MODEL: costs.now},
                )
                predicted[number] = forecast.predict(images, snapshot).finish_s
                ledger.add(images)
                scheduler.add(images)
            batch = scheduler.schedule(now)
            assert batch is not None
            took = device.seconds(batch.rows)
            now += took
            outcome.busy += took
            for image in scheduler.complete(batch, [True] * len(batch.images)):
                outcome.finished[int(image.request_id)] = now
                ledger.remove(image.request_id, image.position)
        outcome.ratios = [
            (end - arrival.at) / p for end, arrival, p in zip(outcome.finished, requests, predicted, strict=True)
        ]
        return outcome

    return serve


def as_request(number: int, arrival: Arrival) -> GenerationRequest:
    """Convert an arrival to a request of the service."""
    key = PlanKey(sampler="ancestral", spec=str(arrival.steps))
    image = ImageParams(plan=key, num_steps=arrival.steps, seed=0, image_index=0, class_index=None)
    return GenerationRequest(
        request_id=str(number),
        model=MODEL,
        images=(image,) * arrival.rows,
        client=f"client {number}",
        deadline_s=None if arrival.patience is None else arrival.patience * UNIT_S,
    )


def request_batcher(width: int, delay: float) -> Server:
    """Return a dynamic batcher of whole requests with equal numbers of steps."""

    def serve(device: Device, requests: Sequence[Arrival]) -> Outcome:
        outcome = Outcome([0.0] * len(requests), 0.0)
        lines: dict[int, deque[int]] = {steps: deque() for steps in MIX}
        rows: Counter[int] = Counter()
        now, nxt = 0.0, 0
        while nxt < len(requests) or any(lines.values()):
            while nxt < len(requests) and requests[nxt].at <= now:
                lines[requests[nxt].steps].append(nxt)
                rows[requests[nxt].steps] += requests[nxt].rows
                nxt += 1
            due = [
                (requests[line[0]].at, steps)
                for steps, line in lines.items()
                if line and (rows[steps] >= width or now >= requests[line[0]].at + delay)
            ]
            if not due:
                ends = [requests[line[0]].at + delay for line in lines.values() if line]
                now = min([*ends, requests[nxt].at] if nxt < len(requests) else ends)
                continue
            line = lines[min(due)[1]]
            batch = [line.popleft()]
            size = requests[batch[0]].rows
            while line and size + requests[line[0]].rows <= width:
                size += requests[line[0]].rows
                batch.append(line.popleft())
            steps = requests[batch[0]].steps
            rows[steps] -= size
            took = steps * device.seconds(size)
            now += took
            outcome.busy += took
            for number in batch:
                outcome.finished[number] = now
        return outcome

    return serve


def best_batcher(device: Device, requests: Sequence[Arrival]) -> Outcome:
    """Find the best settings of the dynamic batcher."""
    settings = itertools.product((device.width, device.width // 2, max(4, device.width // 4)), DELAYS)
    tried = (request_batcher(width, delay)(device, requests) for width, delay in settings)
    return min(tried, key=lambda outcome: statistics.fmean(latencies(requests, outcome)))


def one_at_a_time(device: Device, requests: Sequence[Arrival]) -> Outcome:
    """Serve requests one after the other."""
    outcome = Outcome([], 0.0)
    now = 0.0
    for arrival in requests:
        took = arrival.steps * device.seconds(arrival.rows)
        now = max(now, arrival.at) + took
        outcome.busy += took
        outcome.finished.append(now)
    return outcome


def latencies(requests: Sequence[Arrival], outcome: Outcome) -> list[float]:
    """Return arrival to last image, by request."""
    return [end - arrival.at for end, arrival in zip(outcome.finished, requests, strict=True)]


def line(name: str, device: Device, requests: Sequence[Arrival], outcome: Outcome) -> str:
    """Return a table row with the results of a server."""
    took = latencies(requests, outcome)
    slowdown = [t / (a.steps * device.seconds(a.rows)) for t, a in zip(took, requests, strict=True)]
    good = sum(a.row_steps for a, s in zip(requests, slowdown, strict=True) if s <= SLO)
    goodput = good / (requests[-1].at * device.capacity)
    by_size = [statistics.fmean(s for a, s in zip(requests, slowdown, strict=True) if a.steps == n) for n in MIX]
    figures = [statistics.fmean(took), *(percentile(took, p) for p in (0.5, 0.95, 0.99))]
    cells = [name, *(f"{v:.0f}" for v in figures), f"{goodput:.2f}", *(f"{s:.1f}" for s in by_size)]
    hurried = [t > a.patience for t, a in zip(took, requests, strict=True) if a.patience is not None]
    cells.append(f"{statistics.fmean(hurried):.3f}")
    cells.append(f"{outcome.busy / max(outcome.finished):.2f}")
    ratios = (f"{percentile(outcome.ratios, p):.2f}" for p in (0.1, 0.5, 0.9)) if outcome.ratios else ()
    cells.append(" ".join(ratios) or "-")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table per device and load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="0.3,0.5,0.8,0.95,1.1,1.3", help="comma list")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ageing", default=str(EngineConfig().ageing), help="comma list, for srw")
    parser.add_argument("--devices", default=",".join(d.name for d in DEVICES), help="comma list")
    asked = parser.parse_args()
    servers: dict[str, Server] = {"fifo": step_level("fifo", 1.0), "deadline": step_level("deadline", 1.0)}
    servers |= {f"srw, ageing {a}": step_level("srw", float(a)) for a in asked.ageing.split(",")}
    servers |= {"request batcher": best_batcher, "one at a time": one_at_a_time}
    for device in DEVICES:
        if device.name not in asked.devices.split(","):
            continue
        for load in map(float, asked.loads.split(",")):
            requests = arrivals(device, load, asked.requests, asked.seed)
            print(f"\n{device.name}, c(n) = {device.fixed} + {device.per_row} n, W = {device.width}, load {load}\n")
            print("| server | mean | p50 | p95 | p99 | goodput | slowdown 50 | 100 | 250 | late | busy | ratio |")
            print("|---|" + "---:|" * 10 + "---|")
            for name, server in servers.items():
                print(line(name, device, requests, server(device, requests)), flush=True)


if __name__ == "__main__":
    main()
