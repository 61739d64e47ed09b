"""Folders of files that appear whole or not at all: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from formats.json_files import read_object
from formats.leftovers import aside_name, renaming_in, temporary_for


def may_replace(folder: Path, marker: str, fields: Collection[str]) -> bool:
    """Say whether a folder may be written: it does not exist, is empty, or is one of its kind, whatever version.

    Args:
        folder: what would be replaced, with all that lies in it.
        marker: a JSON file that each of its kind holds. Its name alone tells nothing: many programs write a
            `manifest.json` or `config.json`.
        fields: of the object in it.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    try:
        return set(fields) <= read_object(folder / marker).keys()
    except (OSError, ValueError):
        return False


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder atomically; one that is already there is replaced (ask `may_replace` first).

    Everything goes to a hidden sibling folder first, is fsynced, and takes the name in one rename. An old folder of
    that name is moved aside just before and deleted just after. If anything fails, the old one is still there and the
    temporary folder is gone. What a killed process leaves behind, the next writer of that name removes; where it was
    killed between the two renames, the old folder is put back first.

    Args:
        folder: where it shall be; missing parents are made.
        write: called once with the empty temporary folder, to fill it; whatever it raises goes on to the caller.

    Raises:
        OSError: it cannot be written, for one because the disk is full; names `folder`.
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
