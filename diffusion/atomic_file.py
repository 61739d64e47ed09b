"""Files that appear whole or not at all: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from diffusion.disk_errors import disk_errors_name
from diffusion.leftovers import made_and_held, remove_leftovers, temporary_name


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
    remove_leftovers(path)
    temporary = temporary_name(path)
    with disk_errors_name(path):
        try:
            with made_and_held(temporary, Path.touch):
                write(temporary)
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
