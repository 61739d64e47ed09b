"""Convert disk errors (full, quota, read-only, broken) of all libraries to an OSError with the path.

safetensors raises its own class, zip files raise a second error that hides the cause, and the OSError of a write names
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
"""Format of an operating system error in libraries written in Rust."""


@contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Convert disk errors raised inside to an OSError that names a path.

    Args:
        path: the file or folder being written; used if the error names no file.

    Raises:
        OSError: a disk error was raised inside; other exceptions are passed on.
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
    """Return the number of an OSError, or of the disk error that caused another exception; None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            return error.errno
        if (match := _NUMBER.search(str(error))) and int(match[1] or match[2]) in DISK_ERRNOS:
            return int(match[1] or match[2])
        error = error.__cause__ or error.__context__
    return None
