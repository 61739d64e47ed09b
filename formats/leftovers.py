"""What a killed process leaves of an atomic write, and how the next writer tells it from one that is under way.

A write in progress goes to `.NAME.new-RANDOM` beside NAME, which its writer holds locked; the lock ends with the
process. Where the file system has no locks, nothing is taken for left over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.disk_errors import disk_errors_name

LOCK_SECONDS = 2.0
"""Longest wait for a lock; who holds one longer is no writer of ours."""


def temporary_name(path: Path) -> Path:
    """Return a new name beside a path, to write what shall take its place."""
    return path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")


def aside_name(path: Path) -> Path:
    """Return a new name beside a folder, to move it to while another one takes its place."""
    return path.with_name(f".{path.name}.old-{uuid.uuid4().hex[:8]}")


@contextmanager
def temporary_for(path: Path, make: Callable[[Path], None], remove: Callable[[Path], object]) -> Iterator[Path]:
    """Make a temporary file or folder beside a path, which whoever fills it renames in the end.

    What killed writers left is removed first; if anything fails inside, so is the temporary one.

    Args:
        path: what shall be written; errors of the disk name it.
        make: makes the temporary file or folder.
        remove: removes it, whole or not.
    """
    remove_leftovers(path)
    temporary = temporary_name(path)
    with disk_errors_name(path):
        try:
            with made_and_held(temporary, make):
                yield temporary
        except BaseException:
            remove(temporary)
            raise


@contextmanager
def made_and_held(path: Path, make: Callable[[Path], None]) -> Iterator[None]:
    """Make a temporary file or folder, and hold it locked, so that no other writer takes it for left over."""
    with renaming_in(path.parent):
        make(path)
        descriptor = os.open(path, os.O_RDONLY)
        _try_lock(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def renaming_in(folder: Path) -> Iterator[bool]:
    """Keep others that rename or clean up in a folder waiting, which takes them milliseconds.

    Yields:
        Whether that is so: not where the file system has no locks, or somebody else holds this one.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock_soon(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of a path left beside it.

    Of a writer that was killed between its two renames, the old folder takes its name again.
    """
    if not path.parent.is_dir() or not _leftovers(path):
        return
    with renaming_in(path.parent) as locked:
        for left in _leftovers(path) if locked else []:
            if not _is_abandoned(left):
                continue
            if left.name.startswith(f".{path.name}.old-") and not path.exists():
                left.rename(path)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _leftovers(path: Path) -> list[Path]:
    """Return what is, or was, being written for a path, new ones first."""
    begin = (f".{path.name}.new-", f".{path.name}.old-")
    return sorted(left for left in path.parent.iterdir() if left.name.startswith(begin) and not left.is_symlink())


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _lock_soon(descriptor: int) -> bool:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        except OSError:
            return False
        else:
            return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
