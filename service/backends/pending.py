"""Work in progress: background, deferred or failed. The caller may do other work before it calls `wait`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Work in progress. `wait` is called at most once; the work may also be abandoned without waiting."""

    def wait(self) -> T_co:
        """Wait until the work is done; return its result or raise its error."""
        ...


class Later(Generic[T]):
    """Deferred work, which runs when `wait` is called."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work

    def wait(self) -> T:
        """Do the work and return its result."""
        return self._work()


class Raised:
    """Work that failed to start; `wait` raises its error."""

    def __init__(self, error: Exception) -> None:
        self._errors = [error]

    def wait(self) -> NoReturn:
        """Raise the error."""
        raise self._errors.pop()  # a reference kept here would form a cycle, and keep the memory of the computation
