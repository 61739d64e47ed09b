"""Time of starting on a large folder, and of reading the images of a batch.

    python -m benchmarks.data_loading start FOLDER --files 1280000    # hard links to 400 small PNG files
    python -m benchmarks.data_loading batches FOLDER

Both write below FOLDER, which can be deleted afterwards. Wall and processor time differ on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data import DataConfig, Uint8Array, open_dataset

CLASSES = 1000
PICTURES = 400
BATCH, REPEATS = 64, 20


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["start", "batches"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=1_280_000)
    options = parser.parse_args()
    if options.what == "start":
        measure_start(options.folder, options.files)
    else:
        measure_batches(options.folder)


def measure_start(folder: Path, files: int) -> None:
    """Open a folder of many files without and with an index."""
    data, cache = folder / "linked", folder / "cache"
    if not data.exists():
        pictures = write_pictures(folder / "pictures", PICTURES, (64, 64), "png")
        for number in range(files):
            path = data / f"n{number % CLASSES:08d}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(pictures[number % PICTURES], path)
    for index in cache.glob("*"):
        index.unlink()
    for start in ("first", "second"):
        wall, cpu = timed(lambda: open_dataset(data, 64, 3, cache=cache))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{start} start with {files:,} files: {wall:.1f} s, processor {cpu:.1f} s, memory {memory:.2f} GiB")


def measure_batches(folder: Path) -> None:
    """Read batches of several kinds of files with 1 to 8 threads."""
    for name, size, suffix, count in (
        ("png28", (28, 28), "png", PICTURES),
        ("png64", (64, 64), "png", PICTURES),
        ("jpeg64", (64, 64), "jpg", PICTURES),
        ("jpeg500", (500, 400), "jpg", BATCH),
    ):
        write_pictures(folder / name / "c", count, size, suffix)
        channels, model = (1, 32) if name == "png28" else (3, 64)
        for workers in (1, 2, 4, 8):
            data = open_dataset(folder / name, model, channels, DataConfig(workers=workers), cache=folder / "cache")
            batches = np.random.default_rng(0).integers(0, count, (REPEATS, BATCH))
            times = [timed(partial(data.images, indices)) for indices in batches]
            wall, cpu = np.median(np.array(times), axis=0)
            print(f"{name}, {workers} threads: {BATCH / wall:,.0f} images/s, processor {1e3 * cpu / BATCH:.3f} ms each")


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
    """Return the wall and the processor time of a call, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
