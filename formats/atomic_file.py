"""Files that appear whole or not at all: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from formats.leftovers import temporary_for


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, replacing an older one.

    Raises:
        OSError: it cannot be written, for one because the disk is full; the older one is still there then.
    """
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file that appears whole or not at all.

    Args:
        path: where it shall be; its folder must exist.
        write: called once with the temporary path; whatever it raises goes on to the caller.

    Raises:
        OSError: it cannot be written; what was there is still there then.
    """
    path = path.resolve()  # what a link leads to is replaced, not the link
    with temporary_for(path, Path.touch, lambda temporary: temporary.unlink(missing_ok=True)) as temporary:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
