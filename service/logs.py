"""Log lines: coloured for people at a terminal, JSON for machines, through structlog for every library's records."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable

import structlog

from service.log_writer import BackgroundHandler

SELDOM_S = 60.0
UNLIMITED = frozenset({"cli", "diffusion", "formats", "interchange", "model_export", "service", "trainer", "py"})
"""First parts of the names of loggers that `Seldom` lets pass: our packages', and Python's for warnings (py.warnings),
which come from one line of code and once each."""
REQUEST_FIELDS = ("method", "path", "status", "seconds", "client")
"""What machines need not parse the line of a request for."""


class Seldom(logging.Filter):
    """Pass what a library logs once a minute for each line of its code and kind of exception, with the number left out.

    Libraries repeat themselves as fast as they try again: asyncio when file descriptors run out, OpenTelemetry while
    its collector is away, uvicorn for each client that sends garbage.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._passed: dict[tuple[str, int, type | None], tuple[float, int]] = {}  # when, and how many since

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be logged."""
        if record.name.partition(".")[0] in UNLIMITED:
            return True
        origin = (record.pathname, record.lineno, record.exc_info[0] if record.exc_info else None)
        now = self._clock()
        passed_at, left_out = self._passed.get(origin, (-SELDOM_S, 0))
        if now < passed_at + SELDOM_S:
            self._passed[origin] = passed_at, left_out + 1
            return False
        self._passed[origin] = now, 0
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like it were not logged)", ()
        return True


def configure_logging(level: str = "INFO") -> None:
    """Send all records, and Python's warnings, to standard error, one line each, from a thread of their own."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Where it was closed (2>&-): a descriptor that takes nothing, so that lines count as dropped. It is the lowest free
    # one, which a socket would get otherwise, and with it what C libraries write to standard error.
    descriptor = os.open(os.devnull, os.O_RDONLY) if sys.stderr is None else sys.stderr.fileno()
    terminal = os.isatty(descriptor)
    render: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer()]
    if not terminal:
        shared.append(structlog.stdlib.ExtraAdder(allow=REQUEST_FIELDS))
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = BackgroundHandler(descriptor)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    handler.addFilter(Seldom())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)  # they would be printed to standard error, which may block
