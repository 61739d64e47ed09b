"""Processes that train together, without torchrun: copies of one process that has imported everything.

torchrun is a process itself and starts new ones, which all import PyTorch; that takes longer than a test's training.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  # the first optimizer imports it

import trainer.loop  # noqa: F401  # the command imports it when it is called
from cli.main import app
from tests.waiting import PATIENCE_S

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])


def _rank(arguments: Sequence[str], variables: dict[str, str], output: Path) -> None:
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    app(arguments)


@contextmanager
def started_ranks(arguments: Sequence[str], world: int, output: Path) -> Iterator[list[ForkServerProcess]]:
    """Start a command of `iddpm` in processes with the variables that torchrun sets; kill what is left at the end.

    Args:
        arguments: of the command.
        world: number of processes.
        output: the file to which all processes append their output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        FORKED.Process(target=_rank, args=(arguments, {**variables, "RANK": str(n), "LOCAL_RANK": str(n)}, output))
        for n in range(world)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def run_ranks(arguments: Sequence[str], world: int, output: Path) -> list[int | None]:
    """Run a command of `iddpm` in several processes, as `started_ranks`, to its end.

    Returns:
        The exit codes; None for a process that did not end in time.
    """
    with started_ranks(arguments, world, output) as ranks:
        for rank in ranks:
            rank.join(PATIENCE_S)
        return [rank.exitcode for rank in ranks]
