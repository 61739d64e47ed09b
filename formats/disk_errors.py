"""Errors of the disk (full, quota, read-only, broken) as one OSError with the path, whichever library met them.

safetensors raises a class of its own, zip files bury the cause below a second error, and the OSError of a write names
no file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_NUMBER = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
"""How libraries written in Rust write an error of the operating system."""


@contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Let every error of the disk that is raised inside be an OSError that names a path.

    Args:
        path: what is being written; named where the error names no file itself.
    """
    try:
        yield
    except Exception as error:
        if (number := _errno(error)) is None:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno(error: BaseException | None) -> int | None:
    """Return the number of an OSError without a file name, or of the disk's error behind another exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            return error.errno
        if (match := _NUMBER.search(str(error))) and int(match[1] or match[2]) in DISK_ERRNOS:
            return int(match[1] or match[2])
        error = error.__cause__ or error.__context__
    return None
