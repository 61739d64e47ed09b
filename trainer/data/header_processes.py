"""Read the headers of many files in processes: Pillow holds the interpreter lock while it reads a header."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from threading import Thread

from trainer.data.dataset import DataError
from trainer.data.image_file import Header, Mode, inspect
from trainer.data.options import DataConfig

MOST_PROCESSES, PROCESSES_PER_PROCESSOR = 8, 2
"""Two per processor, because they also wait for the disk."""
FILES_PER_TASK = 512


def read_in_processes(
    folder: Path, files: Sequence[str], mode: Mode, options: DataConfig
) -> Iterator[list[Header | DataError]]:
    """Read the headers of files; yield them, or errors, in the order of the files, some hundred at a time.

    Args:
        folder: where the files are.
        files: paths below it.
        mode: mode of the decoded images.
        options: how files are read.

    Raises:
        DataError: a process ended before its work was done.
    """
    tasks = (files[start : start + FILES_PER_TASK] for start in range(0, len(files), FILES_PER_TASK))
    processes = min(MOST_PROCESSES, PROCESSES_PER_PROCESSOR * len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    try:
        yield from pool.map(partial(_headers, f"{folder}{os.sep}", mode, options), tasks)
    except BrokenProcessPool as error:
        raise DataError(
            f"{folder}: a process that reads headers of images has ended; if memory was short, free some, and start "
            "again: what was read is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not wait for the other tasks


def _headers(prefix: str, mode: Mode, options: DataConfig, files: Sequence[str]) -> list[Header | DataError]:
    headers: list[Header | DataError] = []
    for file in files:
        try:
            headers.append(inspect(prefix + file, mode, options))
        except DataError as error:
            headers.append(error)
    return headers


def _begin() -> None:
    """Leave Ctrl-C to the main process, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None  # noqa: S101  # this is a child
    main_process.join()
    os._exit(1)
