"""Find class indices by name. Differences in spelling are ignored; an ambiguous name is an error."""

from __future__ import annotations

import difflib
import heapq
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise

from diffusion.quoting import quoted
from service.errors import InvalidRequest

MAX_CLASS_NAME = 200
"""Maximum length of a class name, in characters."""

NAMES_SHOWN = 20
NEAREST_SHOWN = 5
SHORTLIST = 50
"""Number of candidates, by pairs of letters in common, among which the nearest names are searched."""

_Index = dict[str, list[int]]


class ClassNames:
    """The names of a model's classes, with a lookup that accepts variant spellings.

    A name is matched exactly first, then ignoring case, then also ignoring spaces, underscores and hyphens. A prompt is
    a list of names separated by commas. In a prompt, a name that contains commas ("tench, Tinca tinca") may be given
    whole or by one of its parts, and any class by its index.

    The constructor builds all tables, so that no request waits for them.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        named = list(enumerate(names))
        parts = [(index, part) for index, name in named for part in name.split(",")]
        self._most_parts = max(name.count(",") + 1 for name in names)
        self._exactly = _index(named, str)
        self._in_any_case = _index(named, _without_case)
        self._squeezed = _index(named, _squeezed)
        self._parts = _index(parts, _squeezed)
        self._pairs = {part: _pairs(part) for part in self._parts}

    def find(self, name: str) -> int:
        """Return the index of the class with that name.

        Raises:
            InvalidRequest: no class or more than one class matches the name.
        """
        found = self._named(name)
        if not found and name.isascii() and name.isdigit():
            raise InvalidRequest("class", f"no class has the name {quoted(name)}; an index is a number without quotes")
        return self._only(found, name, "class")

    def in_prompt(self, prompt: str, most: int) -> list[int]:
        """Return the classes that a prompt lists, in order.

        Args:
            prompt: one or more names, separated by commas.
            most: maximum number of classes.

        Raises:
            InvalidRequest: a part is not a name or is ambiguous, or the prompt lists more than `most` classes.
        """
        parts = prompt.split(",")
        if len(parts) > most * self._most_parts:
            raise InvalidRequest("prompt", f"must list at most {most} classes")
        # End of a name -> its begin and classes. Longer names are tried first: a whole name precedes its parts
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

    def _named(self, name: str) -> list[int]:
        return (
            self._exactly.get(name)
            or self._in_any_case.get(_without_case(name))
            or self._squeezed.get(_squeezed(name), [])
        )

    def _meant(self, name: str) -> list[int]:
        """Return the classes that a piece of a prompt matches, as a name, a part of a name or an index."""
        name = name.strip()
        if not 1 <= len(name) <= MAX_CLASS_NAME:  # normalising is slow, and a prompt may be long
            return []
        if found := self._named(name) or self._parts.get(_squeezed(name)):
            return found
        is_index = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(self.names)
        return [int(name)] if is_index else []

    def _only(self, found: list[int], name: str, field: str) -> int:
        if not found:
            raise self._unknown(name, field)
        if len(found) > 1:
            raise InvalidRequest(field, f"{quoted(name)} names the classes {found}: give the index")
        return found[0]

    def _unknown(self, name: str, field: str) -> InvalidRequest:
        return InvalidRequest(field, f"must be one of {self._some(name)}; got {quoted(name)}")

    def _some(self, name: str) -> str:
        """Return a list of all names if there are few, else of the nearest ones."""
        if len(self.names) <= NAMES_SHOWN:
            return ", ".join(self.names)
        near = difflib.get_close_matches(_squeezed(name), self._shortlist(name), n=NEAREST_SHOWN, cutoff=0.5)
        indices = dict.fromkeys(index for part in near for index in self._parts[part])
        listed = [self.names[index] for index in list(indices)[:NEAREST_SHOWN]] or self.names[:NEAREST_SHOWN]
        return f"{', '.join(listed)}, ... ({len(self.names)} in all, see GET /v1/models)"

    def _shortlist(self, name: str) -> list[str]:
        """Return the most similar parts by shared pairs of letters (Dice's coefficient), faster than difflib."""
        pairs = _pairs(_squeezed(name))
        return heapq.nlargest(
            SHORTLIST, self._pairs, lambda part: len(pairs & self._pairs[part]) / (len(pairs) + len(self._pairs[part]))
        )


def _index(named: Iterable[tuple[int, str]], spelling: Callable[[str], str]) -> _Index:
    index: _Index = defaultdict(list)
    for class_index, name in named:
        indices = index[spelling(name)]
        if class_index not in indices:
            indices.append(class_index)
    return dict(index)


def _without_case(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]+", "", _without_case(name))


def _pairs(squeezed: str) -> frozenset[str]:
    """Return the pairs of neighbouring letters, with a space added at both ends."""
    return frozenset(map("".join, pairwise(f" {squeezed} ")))
