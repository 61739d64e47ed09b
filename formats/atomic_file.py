"""Atomic writes of files: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from formats.leftovers import temporary_for


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, replacing an older one.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; an older file is unchanged.
    """
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically by calling a function with its temporary path.

    Args:
        path: the file to write; its folder must exist.
        write: called once with the temporary path; its exceptions are passed on.

    Raises:
        OSError: the file cannot be written; an older file is unchanged.
    """
    path = path.resolve()  # replaces the target of a link, not the link
    with temporary_for(path, Path.touch, lambda temporary: temporary.unlink(missing_ok=True)) as temporary:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
