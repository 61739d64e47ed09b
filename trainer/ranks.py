"""Ranks: the processes of a run, and the little that they exchange."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from trainer.errors import Stopped, TrainError

T = TypeVar("T")

WAIT_FOR_OTHERS = timedelta(hours=2)
"""Longest time that processes wait for one that opens the data or writes a checkpoint.

A process that ends is noticed at once."""
STOP_WITHIN = 20.0
"""Seconds that a process that got a signal waits for another one, before it ends by itself."""


class Ranks(Protocol):
    """The processes that train one network; each takes a part of every batch."""

    rank: int
    """0..world-1."""
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        ...

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return a network whose backward pass averages the gradients of all processes."""
        ...

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which backward passes of a wrapped network exchange nothing."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, [B / world, ...] each, in the order of the global batch, on the CPU."""
        ...

    def highest(self, value: int) -> int:
        """Return the largest of the processes' values; waits for all of them."""
        ...


class OneProcess:
    """A run in one process."""

    rank = 0
    world = 1
    main = True

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def wrap(self, network: nn.Module) -> nn.Module:
        return network

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, rows: Tensor) -> Tensor:
        return rows.cpu()

    def highest(self, value: int) -> int:
        return value


class Waiting:
    """Whether this process waits for others now, and since when; read by the thread that ends it if it is stuck."""

    def __init__(self) -> None:
        self.agreed = threading.Event()
        """Set when the processes have agreed to end, so that none of them is stuck."""
        self._since: float | None = None

    @contextmanager
    def for_others(self) -> Iterator[None]:
        """Count the time spent inside as waiting."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def longer_than(self, seconds: float, start: float) -> bool:
        """Return whether it has waited for so long, without a break, since `start` or later."""
        since = self._since
        return since is not None and time.monotonic() - max(since, start) > seconds


class ManyProcesses:
    """One process of several, started by torchrun: gradients by DDP, everything else by gloo from host memory."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device = device
        self.waiting = Waiting()
        self._control = dist.new_group(backend="gloo", timeout=WAIT_FOR_OTHERS)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, [self.device] if self.device.type == "cuda" else None)

    @contextmanager
    def no_sync(self, network: nn.Module) -> Iterator[None]:
        assert isinstance(network, DistributedDataParallel)  # noqa: S101  # what `wrap` returned
        with network.no_sync():
            yield

    def gather(self, rows: Tensor) -> Tensor:
        with self.waiting.for_others():  # also in `cpu`: NCCL's exchange of gradients is waited for there
            mine = rows.cpu().contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(parts, mine, group=self._control)
        return torch.stack(parts, dim=1).flatten(0, 1)  # row i of rank r is row i * world + r of the batch

    def close(self) -> None:
        """Leave the processes at the regular end of a run; waits for all of them."""
        self.highest(0)
        gc.collect()  # networks in reference cycles hold the connections, whose threads must end before the process
        dist.destroy_process_group(self._control)
        del self._control
        dist.destroy_process_group()

    def highest(self, value: int) -> int:
        values = torch.tensor(value)
        with self.waiting.for_others():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._control)
        if agreed := int(values):
            self.waiting.agreed.set()
        return agreed


def main_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do some work in the main process, and afterwards in the others, which find in caches what it left there.

    Raises:
        TrainError: in the other processes, if the work failed in the main one, which raises its error.
    """
    if not ranks.main:
        if ranks.highest(0):
            raise TrainError("the main process could not read the data; its message gives the reason")
        return work()
    try:
        result = work()
    except Exception:
        ranks.highest(1)
        raise
    ranks.highest(0)
    return result


@contextmanager
def joined(stop: Callable[[], bool] = lambda: False) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or yield a run in one process.

    Args:
        stop: whether this process has received a signal to stop.

    Raises:
        TrainError: another process has ended. Raised inside the context instead of the error of the communication.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield OneProcess()
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = ManyProcesses(device)
    threading.Thread(target=end_if_stuck, args=(ranks.rank, ranks.waiting, stop), daemon=True).start()
    try:
        yield ranks
    except Stopped:
        ranks.close()  # all processes agreed to stop
        raise
    except RuntimeError as error:  # gloo and NCCL raise it, and subclasses
        if not _is_of_communication(error):
            raise
        raise TrainError(
            f"rank {ranks.rank} of {world} lost the connection to another process, which has ended or was killed; "
            "all processes stop. The newest checkpoint is intact: start the same command again with --resume",
        ) from error
    finally:
        ranks.waiting.agreed.set()
    ranks.close()


def _is_of_communication(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection", "peer"))


def end_if_stuck(rank: int, waiting: Waiting, stop: Callable[[], bool]) -> None:
    """End this process if it got a signal and waits for a process that does not answer, so that it cannot stop.

    Long work of its own (a validation, a checkpoint) is no reason. Nor is the exchange of gradients: gloo reports a
    process that has ended, and with NCCL the next exchange of another kind waits instead.
    """
    while not stop():
        if waiting.agreed.wait(0.5):
            return
    signalled = time.monotonic()
    while not waiting.longer_than(STOP_WITHIN, signalled):
        if waiting.agreed.wait(0.5):
            return
    sys.stderr.write(
        f"rank {rank}: stopped by a signal while waiting for another process; the newest checkpoint is "
        "intact: start the same command again with --resume\n"
    )
    sys.stderr.flush()
    os._exit(1)
