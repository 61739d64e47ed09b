"""What gets into the log."""

from __future__ import annotations

import logging

from service.api.logs import Seldom


def record(logger: str, line: int, message: str) -> logging.LogRecord:
    return logging.LogRecord(logger, logging.WARNING, "library/export.py", line, message, (), None)


def test_a_library_says_each_thing_once_a_minute_and_others_are_not_held_back() -> None:
    now = 0.0
    seldom = Seldom("library", clock=lambda: now)
    for attempt in range(3):
        assert seldom.filter(record("library.export", 10, f"try again in {attempt} s")) is (attempt == 0)
    assert seldom.filter(record("library.export", 20, "gave up"))
    assert all(seldom.filter(record(logger, 10, "try again in 1 s")) for logger in ["service", "service", "library2"])
    now = 59.0
    assert not seldom.filter(record("library.export", 10, "try again in 4 s"))
    now = 61.0
    assert seldom.filter(record("library.export", 10, "try again in 5 s"))
