"""Measure the lag of the event loop, which reveals code that blocks it."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Histogram

CHECK_INTERVAL_S = 0.1


async def measure_loop_lag(lag_seconds: Histogram) -> None:
    """Record ten times a second how late the loop wakes from a sleep, until cancelled."""
    while True:
        due = time.monotonic() + CHECK_INTERVAL_S
        await asyncio.sleep(CHECK_INTERVAL_S)
        lag_seconds.observe(max(0.0, time.monotonic() - due))
