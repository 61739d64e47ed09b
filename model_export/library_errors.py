"""What the exporter and the runtimes raise, told as one error of ours.

Only calls into a library stand inside `library_call`; a mistake of ours anywhere else stays the exception that it is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 400
"""Most characters of a library's own words: PyTorch's exporter writes pages."""


class LibraryError(Exception):
    """A library that export leaves work to has failed; its own exception is the cause."""


@contextmanager
def library_call(library: str, task: str, *raised: type[Exception]) -> Iterator[None]:
    """Turn what a library raises inside into a LibraryError.

    Args:
        library: its name and version.
        task: what it was to do, e.g. "load model.onnx".
        raised: what it is known to raise.

    Raises:
        LibraryError: in one line: library, task, and what the innermost exception says.
    """
    try:
        yield
    except raised as error:
        innermost = _innermost(error)
        said = textwrap.shorten(str(innermost), LONGEST, placeholder=" ...")
        raise LibraryError(f"{library} failed to {task}: {type(innermost).__name__}: {said}") from error


def _innermost(error: BaseException) -> BaseException:
    """Return what began it: PyTorch's exporter wraps that twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
