"""Log lines for all libraries through structlog: coloured text on a terminal, JSON otherwise.

While the service starts, a terminal shows little until the one screen that describes the service when it is ready.
"""

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
"""Top-level names of loggers that `Seldom` does not limit: our packages, and Python's logger of warnings (py.warnings),
whose records all come from one line of code but are logged once each."""
REQUEST_FIELDS = ("method", "path", "status", "seconds", "client")
"""Attributes of request records that become JSON fields."""
SCREEN = "screen"
"""Attribute of the record that ends start-up: its text for a terminal, shown without time and level."""
START_UP = "start_up"
"""Attribute of the same record: its values, a JSON field."""
SHOWN_EARLY = {"shown_early": True}
"""`extra` of the records that a terminal shows during start-up, because the screen may be minutes away."""


class Seldom(logging.Filter):
    """Limit libraries' records to one per minute for each line of code and exception type; append the number omitted.

    Libraries log on every retry: asyncio when file descriptors run out, OpenTelemetry while its collector is down,
    uvicorn for each client that sends invalid requests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._passed: dict[tuple[str, int, type | None], tuple[float, int]] = {}  # time, and records omitted since

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
            record.msg, record.args = f"{record.getMessage()} ({left_out} similar records were not logged)", ()
        return True


class UntilScreen(logging.Filter):
    """At a terminal, hold back the service's and uvicorn's INFO records until the screen, which has their content."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is to be logged."""
        self._shown = self._shown or hasattr(record, SCREEN)
        held_back = record.levelno <= logging.INFO and record.name.partition(".")[0] in ("service", "uvicorn")
        return self._shown or not held_back or any(hasattr(record, name) for name in SHOWN_EARLY)


class ScreenRenderer(structlog.dev.ConsoleRenderer):
    """Renders records for a terminal; of the record that ends start-up only the screen."""

    def __call__(self, logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict) -> str:
        """Return the text of a record."""
        return event[SCREEN] if SCREEN in event else super().__call__(logger, name, event)


def configure_logging(level: str = "INFO") -> None:
    """Log all records and Python's warnings to standard error, one line each, written by a separate thread."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # If standard error is closed (2>&-), use a descriptor that cannot be written, so that lines count as dropped. It
    # takes the lowest free number; a socket with that number would receive C libraries' output to standard error.
    descriptor = os.open(os.devnull, os.O_RDONLY) if sys.stderr is None else sys.stderr.fileno()
    terminal = os.isatty(descriptor)
    shared.append(structlog.stdlib.ExtraAdder(allow=(SCREEN,) if terminal else (*REQUEST_FIELDS, START_UP)))
    render: list[structlog.typing.Processor] = [ScreenRenderer()]
    if not terminal:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = BackgroundHandler(descriptor)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    handler.addFilter(Seldom())
    if terminal:
        handler.addFilter(UntilScreen())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)  # printing warnings to standard error may block
