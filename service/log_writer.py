"""Write log lines in a thread, so that a full pipe does not block the event loop."""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
from typing import NamedTuple

from service.metrics import LOG_LINES_DROPPED

QUEUED_LINES = 4096
"""Most lines in the queue; about a megabyte of request lines."""
FLUSH_SECONDS = 1.0
"""Longest wait for each part of a flush: queueing it, and writing the queued lines."""


class Line(NamedTuple):
    """A formatted log line in the queue of the writing thread."""

    text: bytes
    dropped_before: int
    """Number of lines dropped between the previous queued line and this one."""
    written: threading.Event | None = None
    """Set when the line was written, or could not be written."""


class BackgroundHandler(logging.Handler):
    """Format records in the thread that logs, and write them in a separate thread.

    If the queue is full, or a line cannot be written (closed pipe, full disk), the line is dropped and counted in
    `LOG_LINES_DROPPED`. A line with the number of dropped lines precedes the next line that can be written.
    """

    def __init__(self, descriptor: int, queued_lines: int = QUEUED_LINES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[Line] = queue.Queue(queued_lines)
        self._dropped = 0  # since a line was last queued; guarded by the handler's lock
        self._unreported = 0  # used by the writing thread only
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line, or drop it. Never waits."""
        try:
            text = self.format(record)
        except Exception as error:  # logging would print a traceback to standard error, which may block
            text = self.format(_record(logging.ERROR, f"log record cannot be formatted: {record.msg!r}: {error!r}"))
        try:
            self._lines.put_nowait(Line(f"{text}\n".encode(errors="backslashreplace"), self._dropped))
        except queue.Full:
            self._dropped += 1
            LOG_LINES_DROPPED.labels("queue_full").inc()
        else:
            self._dropped = 0

    def flush(self) -> None:
        """Wait until all lines are written, at most 2 FLUSH_SECONDS, because standard error may be blocked forever."""
        written = threading.Event()
        try:
            self._lines.put(Line(b"", self._dropped, written), timeout=FLUSH_SECONDS)
        except queue.Full:
            return
        self._dropped = 0
        written.wait(FLUSH_SECONDS)

    def _write_lines(self) -> None:
        while True:
            line = self._lines.get()
            self._unreported += line.dropped_before
            try:
                self._write(self._notice() + line.text)
                self._unreported = 0
            except OSError:
                lost = bool(line.text)  # a flush has no text
                self._unreported += lost
                LOG_LINES_DROPPED.labels("write_failed").inc(lost)
            if line.written is not None:
                line.written.set()

    def _notice(self) -> bytes:
        if not self._unreported:
            return b""
        notice = f"log lines dropped here: {self._unreported}; standard error was full or closed"
        return f"{self.format(_record(logging.WARNING, notice))}\n".encode()

    def _write(self, text: bytes) -> None:
        # Not through sys.stderr: the interpreter cannot end while a thread is blocked inside it
        while text:
            try:
                text = text[os.write(self._descriptor, text) :]
            except BlockingIOError:  # another process with the same pipe made it non-blocking
                select.select([], [self._descriptor], [])


def _record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, level, __file__, 0, message, (), None)
