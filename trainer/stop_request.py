"""Handle Ctrl-C, SIGTERM and SIGHUP as a request: the run ends after the current batch, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Records whether a stop was requested, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle signals as stop requests inside; a second signal has its default effect.

        An ignored signal stays ignored (SIGHUP under nohup).
        """
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

        def handle(number: int, _: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
