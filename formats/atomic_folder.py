"""Atomic writes of folders: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from formats.json_files import read_object
from formats.leftovers import aside_name, renaming_in, temporary_for


def may_replace(folder: Path, marker: str, fields: Collection[str]) -> bool:
    """Return whether a folder may be written: it does not exist, is empty, or is of the same kind, of any version.

    Args:
        folder: the folder that would be replaced with all its content.
        marker: a JSON file that every folder of the kind holds. Its name is not sufficient: many programs write a
            `manifest.json` or `config.json`.
        fields: names that the object in the marker must have.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    try:
        return set(fields) <= read_object(folder / marker).keys()
    except (OSError, ValueError):
        return False


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically, replacing an existing one (check `may_replace` first).

    The content goes to a hidden sibling folder, is fsynced, and gets its name in one rename. An existing folder of that
    name is moved aside just before and deleted just after. If anything fails, the existing folder is kept and the
    temporary folder is removed. The next writer of that name removes the leftovers of a killed process; if the process
    was killed between the two renames, the writer first restores the old folder.

    Args:
        folder: the folder to write; missing parents are created.
        write: called once with the empty temporary folder, to fill it; its exceptions are passed on.

    Raises:
        OSError: the folder cannot be written, for example because the disk is full; names `folder`.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_for(folder, Path.mkdir, partial(shutil.rmtree, ignore_errors=True)) as temporary:
        write(temporary)
        _sync_tree(temporary)
        _rename_into_place(temporary, folder)


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
    with renaming_in(folder.parent):
        old = aside_name(folder) if folder.exists() else None
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
