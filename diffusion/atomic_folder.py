"""Folders of files that appear whole or not at all: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def may_replace(folder: Path, marker: str) -> bool:
    """Say whether a folder may be written: it does not exist, is empty, or is one of its kind, which holds `marker`."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / marker).is_file() or not any(folder.iterdir()))


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically; one that is already there is replaced (ask `may_replace` first).

    Everything goes to a hidden sibling folder first, is fsynced, and takes the name in one rename. An old folder of
    that name is moved aside just before and deleted just after. If anything fails, the old one is still there and the
    temporary folder is gone; if the process is killed, a folder named `.NAME.*` may be left over.

    Args:
        folder: where it shall be; missing parents are made.
        write: called once with the empty temporary folder, to fill it; whatever it raises goes on to the caller.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        write(temporary)
        _sync_tree(temporary)
        _rename_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_into_place(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}") if folder.exists() else None
    if old is not None:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
