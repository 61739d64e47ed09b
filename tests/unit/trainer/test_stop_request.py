"""Signals are requests to stop while there is something to save, and have their usual effect otherwise."""

from __future__ import annotations

import os
import signal

import pytest

from trainer.stop_request import SIGNALS, StopRequest


def test_signals_have_their_usual_effect_while_suspended_and_afterwards() -> None:
    stop = StopRequest()
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop.on_signals():
        installed = [signal.getsignal(number) for number in SIGNALS]
        assert not set(installed) & set(before)
        with stop.suspended():
            assert [signal.getsignal(number) for number in SIGNALS] == before
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert [signal.getsignal(number) for number in SIGNALS] == installed
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before
