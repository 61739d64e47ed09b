"""Compare the rate of bulk generation on Ray with that of the engine alone, on a cluster that runs on this machine.

    ray start --head --num-cpus 1; ray start --address 127.0.0.1:6379 --num-cpus 1  # two nodes on one machine
    python -m benchmarks.bulk_ray models/fashion32 --images 384 --steps 20 --shard-size 16 --workers 1 2

All workers start before the first batch. Rates count from when as many batches have arrived as there are workers, to
the end: loading and warming up models, which a long run does once per worker, are not in them. A worker has two batches
at a time, so at least ten per worker are required. CPU seconds are those of the workers and of this process, which
reads, sorts and writes; Ray's own processes are reported apart. Contenders take turns, because other load on the
machine changes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bulk import ALONE, EngineAlone
from benchmarks.options import WORK, exit_status, say
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish
from cli.bulk import Produce, generate_into
from cli.bulk_order import Files, Order
from cli.local_engine import LocalEngine, local_settings
from deploy.ray.bulk import WIDTHS_PER_BATCH, Pool, batches_of, connect, produce_on, reservation
from deploy.ray.devices import with_threads
from formats.generation import Generation

START_S = 1800.0
"""Longest time in which all workers start."""
FEWEST_BATCHES = 10
"""Of a worker. With fewer, much of what counts was computed before the count begins."""
TICKS = os.sysconf("SC_CLK_TCK")
WORKER = "ray::MapWorker"
RAYLET = "/raylet"


Process = tuple[int, int]
"""A process's number, and its start in ticks since the machine's: a number can be used again."""


@dataclass(frozen=True)
class Spent:
    """Seconds between two readings."""

    wall: float
    cpu: float
    """Of the workers and this process."""
    ray: float
    """Of Ray's processes on each node: raylet, agents, idle workers."""


@dataclass(frozen=True)
class Reading:
    """Seconds at one time: by the clock, and CPU seconds of each process since its start."""

    wall: float
    cpu: Mapping[Process, float]
    """Of the workers and this process."""
    ray: Mapping[Process, float]
    """Of Ray's processes on each node: raylet, agents, idle workers."""

    def since(self, earlier: Reading) -> Spent:
        """Return the seconds between two times; those of processes that have ended meanwhile are not known.

        A process counts where it is now: a worker that was idle at first counts as a worker.
        """
        before = {**earlier.cpu, **earlier.ray}

        def spent(now: Mapping[Process, float]) -> float:
            return sum(seconds - before.get(process, 0.0) for process, seconds in now.items())

        return Spent(self.wall - earlier.wall, spent(self.cpu), spent(self.ray))


@dataclass(frozen=True)
class Rates:
    """What one call did."""

    images: int
    spent: Spent

    @property
    def per_wall_second(self) -> float:
        """Images per second."""
        return self.images / self.spent.wall

    @property
    def per_cpu_second(self) -> float:
        """Images per CPU second."""
        return self.images / self.spent.cpu


def read_clocks(address: str) -> Reading:
    """Read the wall clock, and the CPU seconds of all processes of this machine that belong to the run.

    Args:
        address: HOST:PORT of the cluster, of which other clusters on this machine are no part.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found[int(folder.name)] = (int(fields[1]), int(fields[19]), line, (int(fields[11]) + int(fields[12])) / TICKS)
    raylets = {process for process, (_, _, line, _) in found.items() if RAYLET in line and address in line}
    cpu: dict[Process, float] = {(os.getpid(), found[os.getpid()][1]): time.process_time()}
    own: dict[Process, float] = {}
    for process, (parent, start, line, seconds) in found.items():
        if parent in raylets and line.startswith(WORKER):
            cpu[process, start] = seconds
        elif process in raylets or parent in raylets:
            own[process, start] = seconds
    return Reading(time.perf_counter(), cpu, own)


def alone(engine: Callable[[], None], images: int, clocks: Callable[[], Reading]) -> Rates:
    """Time the engine alone, in this process."""
    begun = clocks()
    engine()
    return Rates(images, clocks().since(begun))


def check_batches(pool: Pool, generation: Generation) -> None:
    """Check that each worker of a pool gets enough batches.

    Raises:
        ValueError: there are too few.
    """
    size = WIDTHS_PER_BATCH * pool.settings.max_rows
    batches = sum(1 for _ in batches_of(generation, generation.shards(), size))
    if batches < FEWEST_BATCHES * pool.workers:
        raise ValueError(
            f"images: {generation.count} in shards of {generation.shard_size} are {batches} batches of at most {size}; "
            f"{pool.workers} workers need at least {FEWEST_BATCHES * pool.workers}"
        )


def on_ray(pool: Pool, generation: Generation, clocks: Callable[[], Reading]) -> Rates:
    """Time the generation of a folder from each worker's first batch to the end."""
    readings: list[tuple[Reading, int]] = []
    produce = produce_on(pool, generation)

    def timed(missing: list[range], advance: Callable[[float], None]) -> Iterator[tuple[range, Any]]:
        def read(images: float) -> None:
            if images:
                readings.append((clocks(), int(images)))
            advance(images)

        yield from produce(missing, read)

    measured: Produce = timed
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        generate_into(Path(folder) / "out", generation, measured)
    earlier = sum(images for _, images in readings[: pool.workers])
    return Rates(generation.count - earlier, readings[-1][0].since(readings[pool.workers - 1][0]))


def compare(args: argparse.Namespace) -> dict[str, list[Rates]]:
    """Time the engine alone and pools of workers, in turns."""
    import ray.data

    WORK.mkdir(parents=True, exist_ok=True)
    settings = with_threads(local_settings(args.model.resolve()), 1)
    connect(args.address)
    ray.data.DataContext.get_current().wait_for_min_actors_s = START_S
    pools = {
        f"{count} worker{'s' * (count > 1)} on Ray": Pool(
            workers=count, settings=settings, reserved=reservation(settings, 1, ())
        )
        for count in args.workers
    }
    order = Order(
        sampling={"steps": args.steps, "cfg_scale": 1.0}, num=args.images, per_class=None, classes=None, seed=0,
        image_index=0, files=Files(args.format, args.shard_size),
    )  # fmt: skip
    generation = next(iter(pools.values())).describe(order)
    for pool in pools.values():
        check_batches(pool, generation)
    engine = EngineAlone(settings, LocalEngine(settings), generation)
    clocks = partial(read_clocks, ray.get_runtime_context().gcs_address)
    contenders: dict[str, Callable[[], Rates]] = {ALONE: partial(alone, engine, generation.count, clocks)}
    for name, pool in pools.items():
        contenders[name] = partial(on_ray, pool, generation, clocks)
    found: dict[str, list[Rates]] = {name: [] for name in contenders}
    engine()  # warm
    for number in range(args.rounds):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(contenders[name]())
            say(f"{name}: {found[name][-1]}")
    return found


def report(args: argparse.Namespace) -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    facts = describe_run(torch.device("cpu"), 1)
    found = compare(args)
    rows = []
    for name, rates in found.items():
        cpu = [one.per_cpu_second for one in rates]
        wall = [one.per_wall_second for one in rates]
        shares = [own.per_cpu_second / base.per_cpu_second for own, base in zip(rates, found[ALONE], strict=True)]
        rows.append([
            name,
            f"{np.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})",
            f"{100 * np.median(shares):.1f} % ({100 * min(shares):.0f} to {100 * max(shares):.0f})",
            f"{np.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f})",
            f"{np.median([1000 * one.spent.ray / one.images for one in rates]):.1f}",
        ])  # fmt: skip
    header = ("", "images per CPU second", "of the engine's", "images per wall second", "CPU ms of Ray per image")
    section = markdown_section(facts, markdown_table(header, rows), "benchmarks.bulk_ray")
    publish(args.out, "bulk_ray", section)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--address", default="auto", help="of the cluster (auto: the one that runs here)")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="sizes of the pools (1 2)")
    parser.add_argument("--images", type=int, default=384, help="images of a call (384)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (20)")
    parser.add_argument("--format", default="png", help="png, webdataset, parquet or npz (png)")
    parser.add_argument("--shard-size", type=int, default=16, help="images of a shard (16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=WORK, help=f"folder for the results ({WORK})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_status(report, parse_arguments()))
