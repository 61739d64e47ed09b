"""The lock that allows one writer in a folder at a time: a run, an evaluation, generated images, engines."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.disk_errors import disk_errors_name

LOCK_FILE = ".lock"


class FolderInUse(ValueError):
    """Another process writes in the folder."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by another process ({holder}); wait, or use another --out")
        self.holder = holder
        """Process and host, as the other process wrote them."""


@contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[OSError | None]:
    """Lock an existing folder inside the block; the lock also ends with the process, however it ends.

    Args:
        folder: the folder.
        wait: wait while another process holds the lock.

    Yields:
        None; or the error of a file system without locks, where the folder is not locked.

    Raises:
        FolderInUse: another process holds the lock, and `wait` is false.
        OSError: the lock file cannot be written.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise FolderInUse(folder, lock.read().strip() or "just started") from error
        except OSError as error:
            yield error
            return
        with disk_errors_name(folder / LOCK_FILE):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
        yield None
