"""Files that appear whole or not at all: written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
from pathlib import Path

from diffusion.disk_errors import disk_errors_name
from diffusion.leftovers import made_and_held, remove_leftovers, temporary_name


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, replacing an older one.

    Raises:
        OSError: it cannot be written, for one because the disk is full; the older one is still there then.
    """
    remove_leftovers(path)
    temporary = temporary_name(path)
    with disk_errors_name(path):
        try:
            with made_and_held(temporary, Path.touch), temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
