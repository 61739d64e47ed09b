"""Ways to end the process from where it cannot return: what was logged is written first."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import NoReturn

log = logging.getLogger(__name__)


def end_process(code: int) -> NoReturn:
    """End at once, whatever other threads are doing."""
    logging.shutdown()  # which waits for a blocked standard error for a moment only
    os._exit(code)


def let_sigterm_end_start_up() -> None:
    """Let SIGTERM end process 1 of a container, for which the kernel ignores signals that it does not handle.

    A thread waits for it, since the main one may be compiling a model for minutes. The event loop takes over from it
    (`signal.set_wakeup_fd`). Any other process is ended by the signal itself.
    """
    if os.getpid() == 1:
        wait_for_sigterm()


def wait_for_sigterm() -> None:
    """Start the thread that ends the process at SIGTERM."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while os.read(reading, 1) != bytes([signal.SIGTERM]):
            pass
        log.info("SIGTERM during start-up: ending")
        end_process(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
