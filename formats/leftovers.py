"""Temporary files and folders of atomic writes, and removal of those left by killed processes.

A write in progress goes to `.NAME.new-RANDOM` beside NAME. Its writer holds a lock on it, which ends with the process:
an unlocked temporary is a leftover. On a file system without locks, nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.disk_errors import disk_errors_name

LOCK_SECONDS = 2.0
"""Longest wait for a lock; our writers hold locks for milliseconds only."""


_TEMPORARY = re.compile(r"\.(.+)\.(?:new|old)-[0-9a-f]{8}")


def temporary_name(path: Path) -> Path:
    """Return a new name beside a path, for the content that will replace it."""
    return path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")


def aside_name(path: Path) -> Path:
    """Return a new name beside a path, for moving it aside while it is replaced."""
    return path.with_name(f".{path.name}.old-{uuid.uuid4().hex[:8]}")


@contextmanager
def temporary_for(
    path: Path, make: Callable[[Path], None], remove: Callable[[Path], object], *, cleans_up: bool = True
) -> Iterator[Path]:
    """Create a temporary file or folder beside a path; the caller fills it and renames it to the path.

    Leftovers of killed writers are removed first, if `cleans_up`; that lists the folder. If an exception is raised
    inside, the temporary is removed.

    Args:
        path: the file or folder to write; disk errors name it.
        make: creates the temporary file or folder.
        remove: removes it, complete or not.
        cleans_up: False if the caller has removed leftovers, of many files at once.

    Yields:
        The path of the temporary file or folder.
    """
    if cleans_up:
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
    """Create a temporary file or folder and hold a lock on it, so that no other writer removes it as a leftover."""
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
    """Lock a folder, so that other writers wait before they rename or clean up in it. Locks are held for milliseconds.

    Yields:
        Whether the lock was acquired; False if the file system has no locks, or the wait took over LOCK_SECONDS.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock_soon(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the leftovers of killed writers beside a path.

    If a writer was killed between its two renames, the old folder is renamed back.
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


def remove_leftovers_in(folder: Path, names: Collection[str]) -> None:
    """Remove the leftovers of files with these names in a folder, which is listed once."""
    found = {match[1] for entry in folder.iterdir() if (match := _TEMPORARY.fullmatch(entry.name)) is not None}
    for name in found.intersection(names):
        remove_leftovers(folder / name)


def _leftovers(path: Path) -> list[Path]:
    """Return the temporary files and folders of a path, in use or not; `.new-` before `.old-`."""
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
