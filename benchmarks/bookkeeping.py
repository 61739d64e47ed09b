"""Measure the cost of the engine itself, with thousands of images waiting and a network that does nothing.

    python -m benchmarks.bookkeeping --waiting 10000 --width 32

Timed with each policy in turn:

- step: all of `Engine.step`, for which the device waits between two network calls: scheduling, accounting, results;
- submit: `AsyncEngine.submit`, on the event loop: admission with its prediction;
- eta: `AsyncEngine.eta`, on the event loop: the prediction in a progress event.

Every finished image is replaced by a new one, so the queue keeps its length; a third of the images use guidance, a
tenth are batch work, and one client has a tenth of all images. Goals: the median step below 200 microseconds with
10,000 waiting, and below 2 % of a step at 32 rows; --step-ms sets the duration of such a step.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.options import WORK
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish
from service.backends.base import FailureKind, synchronous_failure_kind
from service.backends.pending import Later, Pending
from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.policies import PolicyName
from service.engine.request import GenerationRequest, GivenArrays, ImageParams, ImageStep, NetworkOf, PlanKey, Priority
from service.metrics import Metrics

MODEL = "m"
CLIENTS = 1000

Costs = dict[tuple[PolicyName, str], list[list[float]]]
"""Seconds of every call, by policy and kind of call, one list per repeat."""


class NullRunner:
    """A runner that computes nothing and returns at once."""

    numerics_id = "null"
    depth = 0
    network_of: NetworkOf | None = None
    trial_given: GivenArrays | None = None
    max_rows = 1024

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def start(self, steps: Sequence[ImageStep]) -> None:
        """Nothing to set up."""

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Report that no row failed."""
        return Later(lambda: [True] * len(steps))

    def failure_kind(self, error: Exception) -> FailureKind:
        """Classify an exception; this network raises none."""
        return synchronous_failure_kind(error)

    def check_network(self) -> None:
        """Nothing to call."""

    def evict(self, slots: Sequence[int]) -> list[object]:
        """There is no state."""
        return [None] * len(slots)

    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        """There is no state."""

    def padded_rows(self, rows: int) -> int:
        """Round up to a power of two, as compiled networks do."""
        return 1 << (rows - 1).bit_length()

    def padded_classified_rows(self, rows: int) -> int:
        """There is no classifier."""
        return 0

    def is_uncaptured(self, rows: int) -> bool:
        """Nothing is captured."""
        return False

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Return pixels of the smallest size."""
        return Later(lambda: np.zeros((len(slots), 1, 1, 1), dtype=np.uint8))

    def read_values(self, slots: Sequence[int], *, both: bool = False) -> Pending[npt.NDArray[np.float32]]:
        """Return values of the smallest size."""
        return Later(lambda: np.zeros((len(slots), 2 if both else 1, 1, 1), dtype=np.float32))

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Return pixels of the smallest size."""
        return self.read(slots)


class GatedRunner(NullRunner):
    """Takes a step when released, so that the engine's thread is idle while the event loop is timed."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Signal that a step has started, and wait to be released."""
        return Later(lambda: self._pass(len(steps)))

    def _pass(self, images: int) -> list[bool]:
        self.arrived.release()
        self.let.acquire()
        return [True] * images


class Crowd:
    """Random requests of one image each; the same sequence for every policy."""

    def __init__(self) -> None:
        self._draw = random.Random(0)  # noqa: S311  # nothing secret
        self._number = 0

    def next(self) -> GenerationRequest:
        """Draw a request."""
        draw = self._draw
        self._number += 1
        steps = draw.choice((50, 50, 50, 100, 100, 250))
        image = ImageParams(
            plan=PlanKey(sampler="ancestral", spec=str(steps)),
            num_steps=steps,
            seed=0,
            image_index=0,
            class_index=None,
            cfg_scale=2.0 if draw.random() < 1 / 3 else 1.0,
        )
        return GenerationRequest(
            request_id=str(self._number),
            model=MODEL,
            images=(image,),
            client="crowd" if draw.random() < 0.1 else str(draw.randrange(CLIENTS)),
            priority=Priority.BATCH if draw.random() < 0.1 else Priority.INTERACTIVE,
            deadline_s=draw.uniform(1e5, 1e6) if draw.random() < 0.5 else None,  # none is refused
        )


def time_steps(config: EngineConfig, waiting: int, steps: int) -> list[float]:
    """Return the seconds of steps of the engine alone, without threads."""
    seconds = []
    engine, crowd = Engine({MODEL: NullRunner()}, config, Metrics()), Crowd()
    for _ in range(waiting):
        engine.add(crowd.next(), time.monotonic())
    for _ in range(steps):
        begun = time.perf_counter()
        left = engine.step()
        seconds.append(time.perf_counter() - begun)
        for _ in left:
            engine.add(crowd.next(), time.monotonic())
    return seconds


async def time_calls(config: EngineConfig, waiting: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of `submit` and of `eta`, called between steps."""
    submit, eta = [], []
    runner, metrics, crowd = GatedRunner(), Metrics(), Crowd()
    engine = AsyncEngine(Engine({MODEL: runner}, config, metrics), config, metrics)
    engine.start()
    while engine.state is not EngineState.READY:
        await asyncio.sleep(0.001)
    tickets = [engine.submit(crowd.next()) for _ in range(waiting)]
    for number in range(steps):
        await asyncio.to_thread(runner.arrived.acquire)
        asked = tickets[number % len(tickets)].request.request_id
        begun = time.perf_counter()
        engine.eta(asked)
        eta.append(time.perf_counter() - begun)
        for place, ticket in enumerate(tickets):
            if ticket.ended.done():
                request = crowd.next()
                begun = time.perf_counter()
                tickets[place] = engine.submit(request)
                submit.append(time.perf_counter() - begun)
        runner.let.release()
    for ticket in tickets:
        engine.abort(ticket.request.request_id)
    runner.let.release()
    await engine.stop()
    return submit, eta


def measure(waiting: int, width: int, steps: int, repeats: int) -> Costs:
    """Time every policy in turns."""
    costs: Costs = {(policy, call): [] for policy in get_args(PolicyName) for call in ("step", "submit", "eta")}
    for _ in range(repeats):
        for policy in get_args(PolicyName):
            config = EngineConfig(
                max_rows=width, max_queue=2 * waiting + 2, max_wait_s=1e9, policy=policy, timed_calls=0
            )
            costs[policy, "step"].append(time_steps(config, waiting, steps))
            submit, eta = asyncio.run(time_calls(config, waiting, steps))
            costs[policy, "submit"].append(submit)
            costs[policy, "eta"].append(eta)
    return costs


def table(costs: Costs, step_s: float) -> str:
    """Write a row per policy and call."""
    rows = []
    for (policy, call), repeats in costs.items():
        medians = [float(np.median(seconds)) for seconds in repeats]
        p99 = [float(np.percentile(seconds, 99)) for seconds in repeats]
        figures = (min(medians), float(np.median(medians)), max(medians), float(np.median(p99)))
        part = f"{np.median(medians) / step_s:.1%}" if call == "step" else ""
        rows.append([policy, call, *(f"{1e6 * value:.0f}" for value in figures), str(sum(map(len, repeats))), part])
    header = ("policy", "call", "median us: best repeat", "middle", "worst", "p99: middle", "calls", "part of a step")
    return markdown_table(header, rows)


def main() -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000, help="per policy and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=10.0, help="duration of a step of the network (10)")
    parser.add_argument("--out", type=Path, default=WORK)
    asked = parser.parse_args()
    facts = describe_run(torch.device("cpu"), threads=1)
    facts["Load"] = f"{asked.waiting:,} images waiting, width {asked.width}, a step of {asked.step_ms:g} ms"
    costs = measure(asked.waiting, asked.width, asked.steps, asked.repeats)
    section = markdown_section(facts, table(costs, asked.step_ms / 1000), "benchmarks.bookkeeping")
    publish(asked.out, "bookkeeping", section)


if __name__ == "__main__":
    main()
