"""SIGTERM for process 1 of a container: the kernel ignores signals that it does not handle."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)


def let_sigterm_end_process_1() -> None:
    """Let SIGTERM end this process if it is process 1, as it ends any other, until something else handles the signal.

    A thread waits for it, since the main one may be inside a library for minutes, where no handler of Python's runs.
    """
    if os.getpid() != 1:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # an event loop puts its own there when it handles signals
    signal.signal(signal.SIGTERM, _handled_by_the_thread)
    threading.Thread(target=_wait_for_sigterm, args=(reading,), name="sigterm", daemon=True).start()


def _handled_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing."""


def _wait_for_sigterm(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        if number == signal.SIGTERM and signal.getsignal(number) is _handled_by_the_thread:
            log.info("SIGTERM: ending at once")
            logging.shutdown()
            os._exit(128 + signal.SIGTERM)
