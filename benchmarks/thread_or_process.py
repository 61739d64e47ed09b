"""Compare the engine in a thread and in a process, driving the same device beside a busy event loop.

    python -m benchmarks.thread_or_process

The event loop spends a part of its time in Python, as handling requests does. The engine takes steps at the same time,
with the real scheduler and the real numpy runner, so that it contends for the interpreter's lock as in the service. The
device is a network that only takes time: computing outside the lock, as OpenVINO does, or sleeping, as when
waiting for a GPU. Compared, in turns:

- thread: `AsyncEngine`, as the service runs it;
- thread, interval: the same after `sys.setswitchinterval`, the time that a thread may keep the lock while another
  one waits for it (default 5 ms);
- process: `benchmarks.engine_process`.

Closed loop: two widths of requests are in flight, of one image each. Reported are the milliseconds from step to step
(the device's time and all overhead), and those from an image's last step to its future; medians, and
for the steps the minimum and maximum of the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from benchmarks.engine_process import EngineProcess
from benchmarks.null_network import NullDenoiser
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish
from diffusion.network_inputs import NetworkInputs
from service.backends.pending import Later, Pending
from service.engine.async_engine import AsyncEngine, EngineState
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, ImageParams, ImageResult, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics

Kind = Literal["computes", "sleeps"]
Place = Literal["thread", "thread, interval", "process"]

MODEL = "m"
WIDTH = 8
GROUPS = 4
GROUP_S = 0.06
"""About the time of a full width of images, so that every device returns the same number of results."""
BURST_S = 0.004
"""The event loop works for a part of this period, then yields: about the time to handle a request."""
ENGINE = EngineConfig(max_rows=WIDTH, timed_calls=0)


class Device(NullDenoiser):
    """A network that only takes time."""

    def __init__(self, kind: Kind, seconds: float, rate: float) -> None:
        super().__init__(image_size=32, max_rows=WIDTH)
        self._seconds = seconds
        self._rounds = max(1, int(rate * seconds)) if kind == "computes" else 0

    def begin(self, inputs: NetworkInputs[Any]) -> Pending[Any]:
        """Return a call that waits without the interpreter's lock when its result is waited for."""
        return Later(lambda: self._take(inputs))

    def _take(self, inputs: NetworkInputs[Any]) -> Any:
        if self._rounds:
            compute(self._rounds)
        else:
            time.sleep(self._seconds)
        return super().begin(inputs).wait()


class Runner(ArrayRunner[Any]):
    """The service's runner, without a self-test."""

    def warm_up(self) -> None:
        """The device is the same for every row."""


def compute(rounds: int) -> None:
    """Compute on one core without the interpreter's lock."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)


def rounds_per_second() -> float:
    """Measure the speed of this machine: the best of a few runs."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        compute(20_000)
        seconds.append(time.perf_counter() - begun)
    return 20_000 / min(seconds)


def make_engine(kind: Kind, seconds: float, rate: float) -> Engine:
    """Build an engine around a device."""
    return Engine({MODEL: Runner(Device(kind, seconds, rate), ENGINE)}, ENGINE, Metrics())


@dataclass(frozen=True)
class Load:
    """Place of the engine, device, and load of the event loop."""

    kind: Kind
    step_ms: float
    busy: float
    """Fraction of the time in which the event loop is busy."""
    place: Place


@dataclass(frozen=True)
class Run:
    """Results of a load."""

    step_ms: float
    """Mean time from step to step."""
    hand_over_ms: float
    """Median time from an image's last step to its future."""


Submit = Callable[[GenerationRequest], Awaitable[ImageResult]]


@asynccontextmanager
async def in_thread(make: Callable[[], Engine]) -> AsyncIterator[Submit]:
    """Run an engine as the service does."""
    engine = AsyncEngine(make(), ENGINE, Metrics())
    engine.start()
    while engine.state is not EngineState.READY:
        await asyncio.sleep(0.001)
    yield lambda request: engine.submit(request).images[0]
    await engine.stop()


@asynccontextmanager
async def in_process(make: Callable[[], Engine]) -> AsyncIterator[Submit]:
    """Run an engine in a separate process."""
    process = EngineProcess(make)
    yield process.submit
    process.stop()


async def be_busy(part: float) -> None:
    """Keep the event loop busy for a part of its time, in Python."""
    while True:
        end = time.perf_counter() + part * BURST_S
        while time.perf_counter() < end:
            pass
        await asyncio.sleep((1 - part) * BURST_S)


async def measure(load: Load, rate: float, switch_interval: float) -> Run:
    """Sample `GROUPS` times the device's width of images, with two widths in flight."""
    step_s = load.step_ms / 1000
    steps = max(4, round(GROUP_S / step_s))
    make = partial(make_engine, load.kind, step_s, rate)
    room = asyncio.Semaphore(2 * WIDTH)

    async def one(submit: Submit, number: int) -> tuple[float, float]:
        params = ImageParams(
            plan=PlanKey(sampler="ancestral", spec=str(steps)),
            num_steps=steps,
            seed=number,
            image_index=0,
            class_index=None,
        )
        async with room:
            begun = time.monotonic()
            result = await submit(GenerationRequest(request_id=str(number), model=MODEL, images=(params,)))
            return begun + result.queue_s + result.compute_s, time.monotonic()

    before = sys.getswitchinterval()
    sys.setswitchinterval(switch_interval if load.place == "thread, interval" else before)
    work = asyncio.get_running_loop().create_task(be_busy(load.busy))
    try:
        async with (in_process if load.place == "process" else in_thread)(make) as submit:
            times = await asyncio.gather(*(one(submit, number) for number in range(GROUPS * WIDTH)))
    finally:
        work.cancel()
        sys.setswitchinterval(before)
    ended = sorted(end for end, _ in times)  # a width of images at a time
    return Run(
        step_ms=1000 * (ended[-1] - ended[0]) / ((GROUPS - 1) * steps),
        hand_over_ms=1000 * float(np.median([arrived - end for end, arrived in times])),
    )


def table(runs: Mapping[Load, Sequence[Run]]) -> str:
    """Write a row per device and load of the event loop, with the places in adjacent columns."""
    places = get_args(Place)
    rows = []
    for kind, step_ms, busy in dict.fromkeys((load.kind, load.step_ms, load.busy) for load in runs):
        found = [runs[Load(kind, step_ms, busy, place)] for place in places]
        steps = [[run.step_ms for run in part] for part in found]
        cells = [f"{np.median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f})" for ms in steps]
        waits = [f"{np.median([run.hand_over_ms for run in part]):.1f}" for part in found]
        rows.append([f"{kind}, {step_ms:g} ms", f"{busy:.0%}", *cells, *waits])
    header = ("device", "loop busy", *(f"step ms: {p}" for p in places), *(f"hand-over ms: {p}" for p in places))
    return markdown_table(header, rows)


def main() -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps-ms", type=float, nargs="+", default=[2, 10, 50])
    parser.add_argument("--busy", type=float, nargs="+", default=[0.1, 0.3, 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--switch-ms", type=float, default=0.5, help="the interval of `thread, interval` (0.5)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    asked = parser.parse_args()
    loads = [Load(*parts) for parts in itertools.product(get_args(Kind), asked.steps_ms, asked.busy, get_args(Place))]
    rate = rounds_per_second()
    runs: defaultdict[Load, list[Run]] = defaultdict(list)
    for _ in range(asked.repeats):
        for load in loads:
            runs[load].append(asyncio.run(measure(load, rate, asked.switch_ms / 1000)))
    facts = describe_run(torch.device("cpu"), threads=1)
    facts["Thread, interval"] = f"sys.setswitchinterval of {asked.switch_ms:g} ms"
    section = markdown_section(facts, table(runs), "benchmarks.thread_or_process")
    publish(asked.out, "thread_or_process", section)


if __name__ == "__main__":
    main()
