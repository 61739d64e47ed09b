"""SIGTERM for process 1 of a container, for which the kernel ignores signals without a handler."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)


def let_sigterm_end_process_1() -> None:
    """Make SIGTERM end this process if it is process 1, until other code handles the signal.

    A thread waits for the signal, because the main thread may be inside a library for minutes, where Python's signal
    handlers do not run.
    """
    if os.getpid() != 1:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)  # an event loop replaces it when it handles signals
    signal.signal(signal.SIGTERM, _handled_by_the_thread)
    threading.Thread(target=_wait_for_sigterm, args=(reading,), name="sigterm", daemon=True).start()


def _handled_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing."""


def _wait_for_sigterm(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        if number == signal.SIGTERM and signal.getsignal(number) is _handled_by_the_thread:
            log.info("SIGTERM: exiting immediately")
            logging.shutdown()
            os._exit(128 + signal.SIGTERM)
