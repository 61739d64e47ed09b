"""Format values for messages: as JSON, short, and safe to print."""

from __future__ import annotations

import json
from collections.abc import Iterable

LONGEST = 60
"""Most characters of a value that a message shows."""

_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)


def quoted(value: object, longest: int = LONGEST) -> str:
    """Return a value as JSON of at most `longest` characters (for a string, not counting its quotation marks)."""
    if isinstance(value, str) and len(value) > longest:
        value = value[: longest - 3] + "..."
    most = longest + len('""')
    text = ""
    for part in _ENCODER.iterencode(value):  # part by part, because a value from outside may be long
        text += part[: most + 1]
        if len(text) > most:
            break
    # JSON does not escape lone surrogates, nor C1 controls and direction marks, which terminals interpret
    text = "".join(char if char.isprintable() else _escaped(char) for char in text)
    return text if len(text) <= most else text[: most - 3] + "..."


def alternatives(values: Iterable[object]) -> str:
    """Return values as JSON, listed as in a sentence: "a", "b" or "c"."""
    return in_words(map(quoted, values))


def in_words(texts: Iterable[str]) -> str:
    """Return texts as they are, listed as in a sentence: a, b or c."""
    *first, last = texts
    return f"{', '.join(first)} or {last}" if first else last


def printable(name: object) -> str:
    """Return the name of a file or a class unchanged, or quoted and escaped if it is not printable."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[begin : begin + 4]}" for begin in range(0, len(units), 4))
