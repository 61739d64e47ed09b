"""How late the event loop runs what is due: encoding or anything else that blocks it shows here."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Histogram

LOOK_EVERY_S = 0.1


async def measure_loop_lag(lag_seconds: Histogram) -> None:
    """Look ten times a second how much later than asked for the loop came back. Until it is cancelled."""
    while True:
        due = time.monotonic() + LOOK_EVERY_S
        await asyncio.sleep(LOOK_EVERY_S)
        lag_seconds.observe(max(0.0, time.monotonic() - due))
