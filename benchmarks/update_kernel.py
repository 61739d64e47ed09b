"""Compare noise and update as one compiled kernel with separate operations, on this machine's device.

    python -m benchmarks.update_kernel --rows 8 32 --image-size 64

Both are timed as the service runs them: on fixed arrays, on a CUDA device as a captured graph. They are measured in
turns; the result is the median of the repeats, without compilation. `differs` is the largest difference in x_prev: one
kernel rounds differently.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import WORK
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish
from diffusion.config import DiffusionConfig
from diffusion.plans import build_plan
from service.backends.cuda_graphs import CallAgain, Capture, CudaCapture
from service.backends.cuda_queue import compiled
from service.engine.runners.step import add_noise_and_advance

CALLS = 20
"""Consecutive calls in a repeat."""


def make_update(rows: int, image_size: int, device: torch.device, *, fused: bool) -> Callable[[], Tensor]:
    """Return the update of a batch of RGB images, on fixed arrays."""
    draw = torch.Generator().manual_seed(0)
    x_t, x0_prev, out, var_values = (
        torch.randn(rows, 3, image_size, image_size, generator=draw).to(device) for _ in range(4)
    )
    plan = build_plan(DiffusionConfig(num_timesteps=1000), "ancestral", "50")
    lines = torch.from_numpy(plan.table[np.arange(rows) % 50]).to(device)
    number = torch.arange(rows, device=device)
    update = compiled(add_noise_and_advance) if fused else add_noise_and_advance

    def run() -> Tensor:
        x_prev: Tensor = update(lines, x_t, x0_prev, out, var_values, (number, number, number), None).x_prev
        return x_prev

    capture: Capture = CudaCapture(device) if device.type == "cuda" else CallAgain()
    with torch.inference_mode():
        capture.warm_up(run)
        return capture(run)


def seconds_of(update: Callable[[], Tensor], device: torch.device) -> float:
    """Time consecutive calls of an update; return the seconds of one."""
    begun = time.perf_counter()
    with torch.inference_mode():
        for _ in range(CALLS):
            update()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / CALLS


def measure(rows: int, image_size: int, device: torch.device, repeats: int) -> list[str]:
    """Compare both for a batch; return a row of the table."""
    separate, fused = (make_update(rows, image_size, device, fused=fused) for fused in (False, True))
    with torch.inference_mode():
        differs = float((separate() - fused()).abs().max())
    seconds = [(seconds_of(separate, device), seconds_of(fused, device)) for _ in range(repeats)]
    apart, together = np.median(seconds, axis=0)
    cells = [f"{1e6 * apart:.0f}", f"{1e6 * together:.0f}", f"{apart / together:.2f}", f"{differs:.1e}"]
    return [str(rows), str(image_size), *cells]


def main() -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=WORK)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    rows = [measure(count, asked.image_size, device, asked.repeats) for count in asked.rows]
    header = ("rows", "image size", "separate us", "one kernel us", "ratio", "differs")
    section = markdown_section(
        describe_run(device, asked.threads), markdown_table(header, rows), "benchmarks.update_kernel"
    )
    publish(asked.out, "update_kernel", section)


if __name__ == "__main__":
    main()
