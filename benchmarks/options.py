"""Options that the timing benchmarks share: where they run, and where their files go."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.contenders import Place
from service.backends.artifact_model import cpu_threads
from service.backends.torch_backend import choose_device

WORK = Path("build/bench")


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add --device, --threads, --work and --out."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads of every contender (one per core)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for networks and artifacts ({WORK})")
    parser.add_argument("--out", type=Path, default=WORK, help=f"folder for the results ({WORK})")


def place_of(args: argparse.Namespace) -> Place:
    """Choose device and threads for the whole process, PyTorch's included.

    On a GPU everybody gets the settings of the service's torch backend, which are process-wide: kernels chosen by
    shape, float32 in float32.

    Raises:
        ModelError: a device that is not there.
    """
    device = choose_device(args.device)
    threads = cpu_threads(args.threads)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return Place(device=device, threads=threads)
