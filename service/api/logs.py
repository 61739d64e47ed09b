"""Log lines: coloured for people at a terminal, JSON for machines, through structlog for every library's records."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import structlog

SELDOM_S = 60.0
REQUEST_FIELDS = ("method", "path", "status", "seconds", "client")
"""What machines need not parse the line of a request for."""


class Seldom(logging.Filter):
    """Lets through what a library says, but each thing once a minute: of an outage it speaks with every attempt."""

    def __init__(self, library: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(library)
        self._clock = clock
        self._said_at: dict[tuple[str, int], float] = {}  # by the line of its code

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record goes on; those of others do."""
        if not super().filter(record):
            return True
        now, thing = self._clock(), (record.pathname, record.lineno)
        if now < self._said_at.get(thing, -SELDOM_S) + SELDOM_S:
            return False
        self._said_at[thing] = now
        return True


def configure_logging(level: str = "INFO") -> None:
    """Send all records to standard error, one line each."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    terminal = sys.stderr.isatty()
    render: list[structlog.typing.Processor] = [structlog.dev.ConsoleRenderer()]
    if not terminal:
        shared.append(structlog.stdlib.ExtraAdder(allow=REQUEST_FIELDS))
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    handler.addFilter(Seldom("opentelemetry"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
