"""Handle Ctrl-C, SIGTERM and SIGHUP as a request: the run ends after the current batch, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Records whether a stop was requested, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle signals as stop requests inside; a second signal has its default effect.

        An ignored signal stays ignored (SIGHUP under nohup).
        """

        def handle(number: int, _: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        with _handled({number: handle for number, before in self._before.items() if before is not signal.SIG_IGN}):
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Give signals their usual effect again inside, for a part of `on_signals` that has nothing to save."""
        with _handled(self._before):
            yield


@contextmanager
def _handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Install handlers of signals, and afterwards those of before."""
    before = {number: signal.signal(number, handler) or signal.SIG_DFL for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
