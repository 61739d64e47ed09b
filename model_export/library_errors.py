"""Convert exceptions of the exporter and the runtimes to `LibraryError`.

Only calls into a library run inside `library_call`; exceptions raised by this project's code are not converted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 400
"""Maximum length of the library's message: PyTorch's exporter writes pages."""


class LibraryError(Exception):
    """A library used by export failed; its exception is the cause."""


@contextmanager
def library_call(library: str, task: str, *raised: type[Exception]) -> Iterator[None]:
    """Convert exceptions raised inside to LibraryError.

    Args:
        library: its name and version.
        task: the operation, e.g. "load model.onnx".
        raised: exceptions that the library may raise.

    Raises:
        LibraryError: one line with library, task, and the message of the innermost exception.
    """
    try:
        yield
    except raised as error:
        innermost = _innermost(error)
        message = textwrap.shorten(str(innermost), LONGEST, placeholder=" ...")
        raise LibraryError(f"{library} failed to {task}: {type(innermost).__name__}: {message}") from error


def _innermost(error: BaseException) -> BaseException:
    """Return the innermost cause: PyTorch's exporter wraps it twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
