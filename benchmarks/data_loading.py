"""Time of starting on a large folder, and of reading the images of a batch.

    python -m benchmarks.data_loading start FOLDER --files 1280000    # hard links to 4,000 small PNG files
    python -m benchmarks.data_loading start FOLDER --files 100000 --distinct    # as many files
    python -m benchmarks.data_loading batches FOLDER

All write below FOLDER, which can be deleted afterwards. Wall and processor time differ on a busy machine. The processor
time of a start includes that of the processes that read headers; --threads reads them in threads instead.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.data import DataConfig, Dataset, IntArray, Uint8Array, checking, network_input, open_dataset, opening
from trainer.data.index import Index

CLASSES = 1000
PICTURES, LINKED_PICTURES = 400, 4000
BATCH, REPEATS = 64, 20
WORKERS = (1, 2, 4)
"""1: the thread that reads ahead, without a pool."""


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "open", "batches"], help="open: a single start, of `start`'s files")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=1_280_000)
    parser.add_argument("--distinct", action="store_true", help="files instead of hard links")
    parser.add_argument("--threads", action="store_true", help="read headers in threads")
    options = parser.parse_args()
    data = options.folder / f"{'files' if options.distinct else 'links'}{options.files}"
    if options.what == "batches":
        measure_batches(options.folder)
    elif options.what == "open":
        measure_opening(data, options.folder / "cache", in_threads=options.threads)
    else:
        write_many(options.folder, data, options.files, distinct=options.distinct)
        for index in (options.folder / "cache").glob("*"):
            index.unlink()
        command = [sys.executable, "-m", "benchmarks.data_loading", "open", options.folder, f"--files={options.files}"]
        command += [f"--{name}" for name in ("distinct", "threads") if getattr(options, name)]
        for title in ("first start", "second start"):  # each in a process of its own: its memory is that of one start
            print(title, flush=True)
            subprocess.run(command, check=True)  # noqa: S603  # this file


def write_many(folder: Path, data: Path, count: int, *, distinct: bool) -> None:
    """Make a folder of many small files in class folders, unless it exists; it appears when it is complete."""
    if data.exists():
        return
    unfinished = data.with_name(f"{data.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    pictures = write_pictures(folder / "pictures", LINKED_PICTURES, (64, 64), "png")
    contents = [path.read_bytes() for path in pictures] if distinct else []
    for label in range(min(CLASSES, count)):
        below = unfinished / f"n{label:08d}"
        below.mkdir(parents=True)
        for number in range(label, count, CLASSES):
            path = f"{below}/{number}.png"
            if distinct:
                Path(path).write_bytes(contents[number % len(contents)])
            else:
                os.link(pictures[number % len(pictures)], path)
    unfinished.rename(data)


def measure_opening(data: Path, cache: Path, *, in_threads: bool) -> None:
    """Open a folder, and print the times of the parts."""
    if in_threads:
        checking.FILES_FOR_PROCESSES = sys.maxsize
    parts: dict[str, tuple[float, float]] = {}
    for title, owner, name in (
        ("list", opening, "list_images"),
        ("stat", Index, "of_files"),
        ("read the index", Index, "recall"),
        ("write the index", checking, "_save"),
    ):
        setattr(owner, name, noting(parts, title, getattr(owner, name)))
    wall, cpu = timed(lambda: open_dataset(data, 64, 3, cache=cache))
    rest = [total - sum(part[at] for part in parts.values()) for at, total in enumerate((wall, cpu))]
    parts["headers, and the rest"] = rest[0], rest[1]
    for title, (part_wall, part_cpu) in {"all": (wall, cpu), **parts}.items():
        print(f"{title}: {part_wall:.1f} s, processor {part_cpu:.1f} s")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", flush=True)


def noting(parts: dict[str, tuple[float, float]], title: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that also notes the time of its call."""

    @functools.wraps(function)
    def noted(*arguments: Any, **named: Any) -> Any:
        results: list[Any] = []
        parts[title] = timed(lambda: results.append(function(*arguments, **named)))
        return results[0]

    return noted


def measure_batches(folder: Path) -> None:
    """Read batches of several kinds of files, as a training run does, with several numbers of threads."""
    for name, size, suffix, count in (
        ("png28", (28, 28), "png", PICTURES),
        ("png64", (64, 64), "png", PICTURES),
        ("jpeg64", (64, 64), "jpg", PICTURES),
        ("jpeg500", (500, 400), "jpg", BATCH),
    ):
        write_pictures(folder / name / "c", count, size, suffix)
        channels, model = (1, 32) if name == "png28" else (3, 64)
        for workers in WORKERS:
            data = open_dataset(folder / name, model, channels, DataConfig(workers=workers), cache=folder / "cache")
            batches = np.random.default_rng(0).integers(0, count, (REPEATS, BATCH))
            times = [timed(partial(read, data, indices)) for indices in batches]
            wall, cpu = np.median(np.array(times), axis=0)
            print(
                f"{name}, {workers} threads: {BATCH / wall:,.0f} images/s, processor {1e3 * cpu / BATCH:.3f} ms each",
                flush=True,
            )


def read(data: Dataset, indices: IntArray) -> object:
    """Read a batch as a network takes it."""
    return network_input(data.images(indices))


def write_pictures(folder: Path, count: int, size: tuple[int, int], suffix: str) -> list[Path]:
    """Write smooth noise as image files, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.{suffix}" for number in range(count)]
    for path in paths:
        steps = rng.normal(0, 6, (size[1], size[0], 3))
        pixels: Uint8Array = np.clip(np.cumsum(steps, axis=1) + 128, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if size == (28, 28) else image).save(path)
    return paths


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and the processor time of a call, in seconds; with ended child processes."""
    wall, cpu = time.perf_counter(), processor_time()
    work()
    return time.perf_counter() - wall, processor_time() - cpu


def processor_time() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
