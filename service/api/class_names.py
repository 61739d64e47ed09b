"""From what people write to class indices: spelling is forgiven, meaning is never guessed."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from service.errors import InvalidRequest

NAMES_SHOWN = 20
NEAREST_SHOWN = 5

_Index = dict[str, list[int]]


@dataclass(frozen=True)
class ClassNames:
    """The names of a model's classes, and what they may be written like.

    A name is taken as it is written if a class has it; else without regard to case; else without regard to spaces,
    underscores and hyphens either. In a prompt, which lists names between commas, a name that holds commas itself
    ("tench, Tinca tinca") may be given whole or by one of its parts, and any class by its index.
    """

    names: tuple[str, ...]

    def find(self, asked: str) -> int:
        """Return the index of the class of that name.

        Raises:
            InvalidRequest: no class has that name, or several have.
        """
        return self._only(self._named(asked), asked, "class")

    def in_prompt(self, prompt: str, most: int) -> list[int]:
        """Return the classes that a prompt lists, in order.

        Args:
            prompt: names, between commas if there are several.
            most: classes it may list.

        Raises:
            InvalidRequest: something in it is no name, or the name of several classes; or it lists too many.
        """
        parts = prompt.split(",")
        if len(parts) > most * self._most_parts:
            raise InvalidRequest("prompt", f"must list at most {most} classes")
        # Where names may end, each with where it began: the longest name first, so that a whole one beats its parts
        ends: dict[int, tuple[int, list[int]]] = {0: (0, [])}
        for begin in range(len(parts)):
            if begin not in ends:
                continue
            for end in range(min(begin + self._most_parts, len(parts)), begin, -1):
                found = self._meant(",".join(parts[begin:end]))
                if found and end not in ends:
                    ends[end] = (begin, found)
        reached = max(ends)
        if reached < len(parts):
            raise self._unknown(parts[reached].strip(), "prompt")
        classes: list[int] = []
        while reached:
            begin, found = ends[reached]
            classes.append(self._only(found, ",".join(parts[begin:reached]).strip(), "prompt"))
            reached = begin
        if len(classes) > most:
            raise InvalidRequest("prompt", f"must list at most {most} classes; got {len(classes)}")
        return classes[::-1]

    def _named(self, asked: str) -> list[int]:
        return (
            self._exactly.get(asked)
            or self._in_any_case.get(_without_case(asked))
            or self._squeezed.get(_squeezed(asked), [])
        )

    def _meant(self, asked: str) -> list[int]:
        """Return the classes that a piece of a prompt may mean: a name, a part of one, an index."""
        asked = asked.strip()
        if not asked:
            return []
        if found := self._named(asked) or self._parts.get(_squeezed(asked)):
            return found
        is_index = asked.isascii() and asked.isdigit() and len(asked) < 10 and int(asked) < len(self.names)
        return [int(asked)] if is_index else []

    def _only(self, found: list[int], asked: str, field: str) -> int:
        if not found:
            raise self._unknown(asked, field)
        if len(found) > 1:
            raise InvalidRequest(field, f"{asked!r} names the classes {found}: give the index")
        return found[0]

    def _unknown(self, asked: str, field: str) -> InvalidRequest:
        asked = asked if len(asked) <= 60 else asked[:57] + "..."
        return InvalidRequest(field, f"must be one of {self._some(asked)}; got {asked!r}")

    def _some(self, asked: str) -> str:
        """List all names if they are few, the nearest ones otherwise."""
        if len(self.names) <= NAMES_SHOWN:
            return ", ".join(self.names)
        near = difflib.get_close_matches(_squeezed(asked), self._parts, n=NEAREST_SHOWN, cutoff=0.5)
        indices = dict.fromkeys(index for part in near for index in self._parts[part])
        listed = [self.names[index] for index in list(indices)[:NEAREST_SHOWN]] or self.names[:NEAREST_SHOWN]
        return f"{', '.join(listed)}, ... ({len(self.names)} in all, see GET /v1/models)"

    @cached_property
    def _exactly(self) -> _Index:
        return _index(enumerate(self.names), str)

    @cached_property
    def _in_any_case(self) -> _Index:
        return _index(enumerate(self.names), _without_case)

    @cached_property
    def _squeezed(self) -> _Index:
        return _index(enumerate(self.names), _squeezed)

    @cached_property
    def _parts(self) -> _Index:
        return _index(((index, part) for index, name in enumerate(self.names) for part in name.split(",")), _squeezed)

    @cached_property
    def _most_parts(self) -> int:
        return max(name.count(",") + 1 for name in self.names)


def _index(named: Iterable[tuple[int, str]], spelling: Callable[[str], str]) -> _Index:
    index: _Index = defaultdict(list)
    for class_index, name in named:
        if class_index not in index[spelling(name)]:
            index[spelling(name)].append(class_index)
    return dict(index)


def _without_case(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]+", "", _without_case(name))
