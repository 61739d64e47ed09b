"""Values in messages are JSON, short, and safe for a terminal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diffusion.quoting import alternatives, quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        (float("nan"), "NaN"),
        ("Dog", '"Dog"'),
        ("it's", '"it\'s"'),
        ('a "b"', r'"a \"b\""'),
        ("Käse", '"Käse"'),
        ({"a": [None, False]}, '{"a": [null, false]}'),
        ("\x1b[31m\n", r'"\u001b[31m\n"'),
        ("\x9b31m\u202e", r'"\u009b31m\u202e"'),
        ("\ud800", r'"\ud800"'),
        ("\U000e0001", r'"\udb40\udc01"'),
        ("x" * 61, '"' + "x" * 57 + '..."'),
    ],
)
def test_a_value_is_shown_as_json(value: Any, shown: str) -> None:
    assert quoted(value) == shown
    assert quoted(value).isprintable()
    quoted(value).encode()


def test_long_values_are_cut_off() -> None:
    assert quoted(list(range(1000))).endswith("...")
    assert all(len(quoted(value)) <= 62 for value in ("x" * 1000, "\n" * 60, [["x"] * 100] * 100, 10**4000))
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    assert quoted(deep) == "[" * 59 + "..."


def test_no_more_of_a_long_value_is_encoded_than_is_shown() -> None:
    asked = []

    class Counted:
        def __str__(self) -> str:
            asked.append(self)
            return "counted"

    assert quoted([Counted()] * 1000).startswith('["counted", ')
    assert len(asked) < 10


def test_short_values_can_be_read_back() -> None:
    for value in ("\ud800", "\x9b", "\U0001f600\u200b", "'\"\\"):
        assert json.loads(quoted(value)) == value


def test_a_list_of_alternatives_is_a_sentence() -> None:
    assert alternatives(["a"]) == '"a"'
    assert alternatives(["a", "b", "c"]) == '"a", "b" or "c"'
