"""Measure the delay of an event loop: the duration of a sleep beyond the requested time."""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI

EVERY_S = 0.005


class LoopLag:
    """Measures the event loop of its first caller, from the first call on."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._task: asyncio.Task[None] | None = None

    def install(self, app: FastAPI) -> None:
        """Answer GET /lag with the milliseconds since the previous request."""
        app.add_api_route("/lag", self.take)

    async def take(self) -> list[float]:
        """Return the measured lags, in milliseconds, and reset."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch())
        found, self._late = self._late, []
        return found

    async def _watch(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(EVERY_S)
            self._late.append(1000 * (time.perf_counter() - begun - EVERY_S))
