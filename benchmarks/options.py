"""Common command-line options of the timing benchmarks: device, folders, output and errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contenders import Place
from service.backends.artifact_model import cpu_threads
from service.backends.torch_backend import choose_device, choose_kernels_repeatably

WORK = Path("build/bench")


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add --device, --threads, --work and --out."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads of every contender (one per core)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for networks and artifacts ({WORK})")
    parser.add_argument("--out", type=Path, default=WORK, help=f"folder for the results ({WORK})")


def place_of(args: argparse.Namespace) -> Place:
    """Set device and threads of the process, including PyTorch's.

    On a GPU all contenders get the settings of the service's torch backend, which are process-wide.

    Raises:
        ModelError: the device does not exist.
    """
    device = choose_device(args.device)
    threads = cpu_threads(args.threads)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        choose_kernels_repeatably()
    return Place(device=device, threads=threads)


def exit_status(run: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Run a command; report user errors in one line."""
    try:
        run(args)
    except ValueError as error:
        say(f"error: {error}")
        return 1
    return 0


def say(text: str) -> None:
    """Print progress on standard error, separate from the results."""
    print(text, file=sys.stderr, flush=True)
