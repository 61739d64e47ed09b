"""Cache of what is computed from large data once: indexes of folders, unpacked arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from formats.atomic_file import replace_file


def default_cache() -> Path:
    """Return the user's cache folder for data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iddpm" / "data"


def write_in(cache: Path, name: str, write: Callable[[Path], object]) -> Path:
    """Write a file of the cache atomically, and return its path.

    Raises:
        OSError: the file cannot be written; names it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(cache / name, write)
    return cache / name
