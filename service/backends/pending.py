"""Work that was begun: it goes on while its caller does something else, until somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Work under way. It is waited for at most once, and may be forgotten instead."""

    def wait(self) -> T_co:
        """Return what came of it, as soon as there is something; raises what it raised."""
        ...


class Later(Generic[T]):
    """Work that cannot go on by itself: it is done when it is waited for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work

    def wait(self) -> T:
        """Do it."""
        return self._work()


class Raised:
    """Work that could not be begun: its error is raised when it is waited for."""

    def __init__(self, error: Exception) -> None:
        self._errors = [error]

    def wait(self) -> NoReturn:
        """Raise it."""
        raise self._errors.pop()  # kept here, it would keep itself, and the memory of all that was being computed
