"""Run the app under uvicorn, and end it well: a signal drains first, accepted requests finish, exit code 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from service.api.state import ServiceState
from service.settings import Settings

log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Uvicorn closes its socket at once on a signal; this one keeps answering (503, /readyz red) until it is idle."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT: the first drains, a second one stops at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._drain is not None:
            log.warning("%s again: stopping at once, accepted requests are lost", number.name)
            self.force_exit = self.should_exit = True
            return
        log.info("%s: finishing accepted requests, refusing new ones", number.name)
        self._drain = asyncio.get_running_loop().create_task(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        state = getattr(self._app.state, "service", None)
        if isinstance(state, ServiceState):
            state.engine.drain()
            await state.engine.wait_idle()
        self.should_exit = True


def serve(app: FastAPI, settings: Settings) -> None:
    """Serve until a signal says otherwise."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=32768,
    )
    DrainingServer(config, app).run()
