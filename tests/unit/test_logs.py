"""What gets into the log."""

from __future__ import annotations

import json
import logging

import pytest

from service.api.logs import REQUEST_FIELDS, Seldom, configure_logging


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


def test_machines_read_a_request_s_fields_apart_from_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)  # to be put back
    level = root.level
    try:
        configure_logging()
        told = dict(zip(REQUEST_FIELDS, ("GET", "/", 200, 0.001, "alice"), strict=True))
        logging.getLogger("x").info("GET / 200", extra={**told, "colour": "red"})
    finally:
        root.setLevel(level)
    line = json.loads(capsys.readouterr().err)
    assert line["event"] == "GET / 200"
    assert {name: line.get(name) for name in (*REQUEST_FIELDS, "colour")} == {**told, "colour": None}
