"""The content of the log, and the handling of lines that cannot be written."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from service.log_writer import BackgroundHandler
from service.logs import REQUEST_FIELDS, SCREEN, SHOWN_EARLY, START_UP, Seldom, configure_logging
from service.metrics import LOG_LINES_DROPPED
from tests.waiting import PATIENCE_S

Dropped = Callable[[str], float]


def record(logger: str, line: int, message: str, error: Exception | None = None) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, None)
    return logging.LogRecord(logger, logging.WARNING, "library/export.py", line, message, (), exc_info)


def test_records_of_libraries_are_limited_to_one_a_minute_and_ours_are_not() -> None:
    now = 0.0
    seldom = Seldom(clock=lambda: now)
    for attempt in range(3):
        assert seldom.filter(record("library.export", 10, f"try again in {attempt} s")) is (attempt == 0)
    assert seldom.filter(record("library.export", 20, "gave up"))
    assert seldom.filter(record("library.export", 10, "another error", OSError()))
    assert not seldom.filter(record("library.export", 10, "another error", OSError()))
    for ours in ("service.http.door.observe", "service", "cli.main", "py.warnings"):
        assert all(seldom.filter(record(ours, 10, "GET / 200")) for _ in range(2))
    now = 59.0
    assert not seldom.filter(record("library.export", 10, "try again in 4 s"))
    now = 61.0
    passed = record("library.export", 10, "try again in 5 s")
    assert seldom.filter(passed)
    assert passed.getMessage() == "try again in 5 s (3 similar records were not logged)"
    now = 122.0
    passed = record("library.export", 10, "try again in 6 s")
    assert seldom.filter(passed)
    assert passed.getMessage() == "try again in 6 s"


@pytest.fixture
def logging_configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[BackgroundHandler]:
    """Configure logging as the service does, and restore the former state at the end."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)
    level = root.level
    configure_logging()
    (handler,) = root.handlers
    assert isinstance(handler, BackgroundHandler)
    yield handler
    logging.captureWarnings(False)
    root.setLevel(level)


def test_json_records_have_the_fields_of_a_request_besides_the_message(
    capfd: pytest.CaptureFixture[str], logging_configured: BackgroundHandler
) -> None:
    fields = dict(zip(REQUEST_FIELDS, ("GET", "/", 200, 0.001, "alice"), strict=True))
    logging.getLogger("x").info("GET / 200", extra={**fields, "colour": "red"})
    logging_configured.flush()
    line = json.loads(capfd.readouterr().err)
    assert line["event"] == "GET / 200"
    assert {name: line.get(name) for name in (*REQUEST_FIELDS, "colour")} == {**fields, "colour": None}


def test_the_end_of_start_up_is_one_line_with_its_values(
    capfd: pytest.CaptureFixture[str], logging_configured: BackgroundHandler
) -> None:
    logging.getLogger("service").info("details")
    logging.getLogger("service").info("ready", extra={START_UP: {"width": 8}, SCREEN: "\n  width 8\n"})
    logging_configured.flush()
    details, ready = map(json.loads, capfd.readouterr().err.splitlines())
    assert details["event"] == "details"
    assert (ready["event"], ready["start_up"], SCREEN in ready) == ("ready", {"width": 8}, False)


def test_a_terminal_shows_one_screen_instead_of_the_details_of_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    controlling, terminal = os.openpty()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(fileno=lambda: terminal))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)
    level = root.level
    configure_logging()
    try:
        service = logging.getLogger("service.x")
        service.info("settings")
        logging.getLogger("uvicorn.error").info("started")
        logging.getLogger("formats.x").info("compiling")
        service.info("loading", extra=SHOWN_EARLY)
        service.warning("slow")
        service.info("ready", extra={START_UP: {}, SCREEN: "\n  the screen\n"})
        service.info("request")
        root.handlers[0].flush()
        text = ""
        while "request" not in text:  # a terminal gives what it has, which may be less than was written
            text += os.read(controlling, 65536).decode()
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        os.close(controlling)
        os.close(terminal)
    shown = [re.sub("\x1b\\[[0-9;]*m", "", line).rstrip() for line in text.splitlines() if line.strip()]
    events = [" ".join(line.split()[3:-1]) if line.startswith("2") else line for line in shown]
    assert events == ["compiling", "loading", "slow", "  the screen", "request"]


def test_warnings_are_logged(capfd: pytest.CaptureFixture[str], logging_configured: BackgroundHandler) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("old", DeprecationWarning, "file.py", 1)
    logging_configured.flush()
    assert "DeprecationWarning: old" in json.loads(capfd.readouterr().err)["event"]


def test_a_record_that_cannot_be_formatted_is_logged_as_an_error_without_traceback(
    capfd: pytest.CaptureFixture[str], logging_configured: BackgroundHandler
) -> None:
    unfit = logging.LogRecord("x", logging.INFO, "file.py", 1, "%d images", ("many",), None)
    logging_configured.handle(unfit)  # pytest's own handlers would raise
    logging_configured.flush()
    line = json.loads(capfd.readouterr().err)
    assert line["level"] == "error"
    assert line["event"].startswith("log record cannot be formatted: '%d images': TypeError(")


@pytest.fixture
def dropped() -> Dropped:
    """Return a function that counts the lines dropped in this test, by reason."""

    def count(reason: str) -> float:
        return next(s.value for m in LOG_LINES_DROPPED.collect() for s in m.samples if s.labels == {"reason": reason})

    before = {reason: count(reason) for reason in ("queue_full", "write_failed")}
    return lambda reason: count(reason) - before[reason]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe; close its ends, where the test has not, at the end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


def fill(writing: int) -> int:
    """Fill a pipe; return the number of bytes written."""
    os.set_blocking(writing, False)
    written = 0
    try:
        while True:
            written += os.write(writing, b"." * 4096)
    except BlockingIOError:
        return written


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_for_an_unread_pipe_are_dropped_and_counted_in_the_log(
    pipe: tuple[int, int], dropped: Dropped, blocking: bool
) -> None:
    reading, writing = pipe
    filled = fill(writing)
    os.set_blocking(writing, blocking)
    handler = BackgroundHandler(writing, queued_lines=10)
    for number in range(100):
        handler.handle(record("x", 1, f"line {number}"))  # returns, although no line can be written
    handler.flush()
    lost = int(dropped("queue_full"))
    assert lost in (89, 90)  # the writing thread may hold one line

    written = b""
    while len(written) < filled:
        written += os.read(reading, filled - len(written))
    handler.flush()
    handler.handle(record("x", 1, "the last line"))
    handler.flush()
    lines = os.read(reading, 1 << 16).decode().splitlines()
    assert lines.pop() == "the last line"
    number, noted = 0, 0
    for line in lines:  # which lines find room depends on when the thread takes them; the notes fill the gaps
        if (
            note := re.fullmatch(r"log lines dropped here: (\d+); standard error was full or closed", line)
        ) is not None:
            number, noted = number + int(note[1]), noted + int(note[1])
        else:
            assert line == f"line {number}"
            number += 1
    assert (number, noted) == (100, lost)


def test_lines_for_a_closed_pipe_are_dropped_without_other_effects(pipe: tuple[int, int], dropped: Dropped) -> None:
    reading, writing = pipe
    os.close(reading)
    handler = BackgroundHandler(writing)
    for _ in range(3):
        handler.handle(record("x", 1, "line"))
    handler.flush()
    assert dropped("write_failed") == 3


WITHOUT_STANDARD_ERROR = """
import logging, os, socket, sys
from service.logs import configure_logging
from service.metrics import LOG_LINES_DROPPED

configure_logging()
with socket.socket() as other:
    assert other.fileno() != 2  # else whatever is written to standard error would go there
    logging.getLogger("x").info("line")
    logging.getLogger().handlers[0].flush()
print(LOG_LINES_DROPPED.labels("write_failed")._value.get())
"""


def test_closed_standard_error_does_not_end_the_process() -> None:
    def close_standard_error() -> None:
        os.close(2)

    options: dict[str, Any] = {"preexec_fn": close_standard_error, "stdout": subprocess.PIPE}
    ended = subprocess.run([sys.executable, "-c", WITHOUT_STANDARD_ERROR], timeout=PATIENCE_S, check=False, **options)
    assert (ended.returncode, ended.stdout) == (0, b"1.0\n")
