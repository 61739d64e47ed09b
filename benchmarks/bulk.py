"""Compare the speed of `iddpm generate` with that of the service's engine alone, on this machine.

    python -m benchmarks.bulk models/fashion32 --images 64 --steps 50 --shard-size 16

The engine alone holds all images from the start and drops them when they are done. Contenders take turns; the
result is the median. Each call of `generate` begins a folder, fills it and completes it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.options import WORK, exit_status
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish
from benchmarks.rounds import Pace, Timing, take_turns
from cli.bulk import generate_into, produce_here
from cli.bulk_order import Files, choose_classes, describe_generation, requests_for
from cli.local_engine import LocalEngine, local_settings
from formats.generation import Generation
from formats.shards import FORMATS
from service.backends.artifact_model import cpu_threads
from service.backends.select import load_model
from service.engine.engine import Engine
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from service.settings import Settings

ALONE = "the engine alone"
WORKER = "a worker of deploy.ray.bulk, without Ray"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class EngineAlone:
    """An engine with the settings of the service, and the images of a generation."""

    def __init__(self, settings: Settings, local: LocalEngine, generation: Generation) -> None:
        config = settings.engine_config()
        ((served, folder),) = local.stages
        denoiser = load_model(folder, settings.backend, settings.backend_options())
        self._engine = Engine({served.name: ArrayRunner(denoiser, config)}, config, Metrics())
        self._engine.warm_up()
        requests = requests_for(local, generation, range(generation.count))
        self._requests = [replace(request, request_id=str(k)) for k, request in enumerate(requests)]
        self._count = generation.count

    def __call__(self) -> None:
        """Generate all images, as the service's thread takes steps.

        Raises:
            RuntimeError: an image is missing.
        """
        engine, done = self._engine, 0
        for request in self._requests:
            engine.add(request, time.monotonic())
        while engine.has_work():
            engine.launch()
            done += len(engine.report())
            engine.settle()
        done += len(engine.report())
        if done != self._count:
            raise RuntimeError(f"{done} of {self._count} images")


def generate_once(engine: LocalEngine, generation: Generation) -> None:
    """Generate images into a new folder, which is removed, without showing the progress."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder, contextlib.redirect_stderr(io.StringIO()):
        generate_into(Path(folder) / "out", generation, produce_here(engine, generation))


class WorkerAlone:
    """A worker of bulk generation on Ray, called as Ray Data calls it, but without Ray."""

    def __init__(self, settings: Settings, generation: Generation) -> None:
        from deploy.ray.bulk import CALLS_PER_WORKER, WIDTHS_PER_BATCH, batches_of
        from deploy.ray.bulk_worker import Worker

        self._worker, self._calls = Worker(settings, generation), CALLS_PER_WORKER
        tables = batches_of(generation, [range(generation.count)], WIDTHS_PER_BATCH * settings.max_rows)
        self._batches = [{name: table[name].to_numpy() for name in table.column_names} for table in tables]

    def __call__(self) -> None:
        """Generate all images."""
        with ThreadPoolExecutor(self._calls) as pool:
            for _ in pool.map(self._worker, self._batches):
                pass


def compare(args: argparse.Namespace) -> dict[str, Timing]:
    """Time the engine alone, `iddpm generate` in each format, and a worker of deploy.ray.bulk if it is asked for."""
    WORK.mkdir(parents=True, exist_ok=True)
    local = LocalEngine(local_settings(args.model))
    sampling = {"steps": args.steps, "cfg_scale": args.cfg_scale}
    describe = partial(
        describe_generation,
        local,
        sampling,
        seed=0,
        image_index=0,
        count=args.images,
        classes=choose_classes(local, sampling, None),
    )
    contenders: dict[str, Callable[[], None]] = {
        f"iddpm generate --format {form}": partial(generate_once, local, describe(files=Files(form, args.shard_size)))
        for form in FORMATS
        if form in args.formats
    }
    settings, generation = Settings(models=(args.model,)), describe(files=Files("npz", args.shard_size))
    if args.worker:
        contenders[WORKER] = WorkerAlone(settings, generation)
    alone = EngineAlone(settings, local, generation)
    pace = Pace(rounds=args.rounds, max_seconds=args.max_seconds, warm_up_calls=1)
    return take_turns({ALONE: alone, **contenders}, pace, clock=CLOCKS[args.clock])


def report(args: argparse.Namespace) -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    facts = describe_run(torch.device("cpu"), cpu_threads(None))
    timings = compare(args)
    rows = []
    for name, timing in timings.items():
        shares = [alone / own for alone, own in zip(timings[ALONE].seconds, timing.seconds, strict=True)]
        share = Timing(tuple(shares))
        low, high = share.quartiles
        rows.append([
            name,
            f"{args.images / timing.median:.2f}",
            f"{args.images / timing.best:.2f}",
            f"{100 * share.median:.1f} %",
            f"{100 * low:.0f} to {100 * high:.0f} %",
        ])  # fmt: skip
    table = markdown_table(
        ("", f"images per {args.clock} second", "best", "of the engine's, median of rounds", "quartiles"), rows
    )
    section = markdown_section(facts, table, "benchmarks.bulk")
    publish(args.out, "bulk", section)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--images", type=int, default=64, help="images of a call (64)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (50)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="classifier-free guidance (1: off)")
    parser.add_argument("--shard-size", type=int, default=16, help="images of a shard (16)")
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--worker", action="store_true", help="time a worker of deploy.ray.bulk too")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: seconds of all threads, which other load disturbs less",
    )
    parser.add_argument("--max-seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=WORK, help=f"folder for the results ({WORK})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(exit_status(report, parse_arguments()))
