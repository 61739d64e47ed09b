"""Atomic writes of files: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from formats.leftovers import remove_leftovers_in, temporary_for


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, replacing an older one.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; an older file is unchanged.
    """
    replace_file(path, partial(Path.write_bytes, data=content))


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder, each atomically, replacing older ones.

    Raises:
        OSError: a file cannot be written; an older one is unchanged. Files before it are written.
    """
    remove_leftovers_in(folder, contents)
    for name, content in contents.items():
        _replace(folder / name, partial(Path.write_bytes, data=content), cleans_up=False)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically by calling a function with its temporary path.

    Args:
        path: the file to write; its folder must exist.
        write: called once with the temporary path; its exceptions are passed on.

    Raises:
        OSError: the file cannot be written; an older file is unchanged.
    """
    _replace(path, write, cleans_up=True)


def _replace(path: Path, write: Callable[[Path], object], *, cleans_up: bool) -> None:
    path = path.resolve()  # replaces the target of a link, not the link
    remove = partial(Path.unlink, missing_ok=True)
    with temporary_for(path, Path.touch, remove, cleans_up=cleans_up) as temporary:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
