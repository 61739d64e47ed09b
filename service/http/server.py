"""Run the app under uvicorn with a graceful shutdown: on a signal, finish accepted requests, then exit with code 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from service.engine.async_engine import AsyncEngine, EngineState
from service.http.door.address import bind, url_of
from service.http.door.connection import limited_protocol
from service.http.door.connection_limit import OpenConnections, descriptor_budget
from service.http.door.guard import MAX_HEADER_BYTES
from service.http.start_up import start_up_facts, start_up_screen
from service.http.state import ServiceState
from service.logs import SCREEN, SHOWN_EARLY, START_UP
from service.settings import Settings

STRAGGLER_SECONDS = 30
"""Time limit after the drain for connections with a partial body or with an answer that the client does not read."""
DEATH_NOTICE_SECONDS = 2.0
"""Delay between the engine's death and the end of the process, so that answers are sent and health checks fail."""

BACKLOG = 2048
"""Number of connections that the kernel queues until they are accepted."""

SWITCH_INTERVAL_S = 0.0005
"""Interval after which a thread must release the interpreter lock to a waiting one, instead of Python's 5 ms. While the
engine's thread waits for the lock, the device is idle (docs/decisions/0012)."""

log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains on a signal: it keeps answering (503, also at /readyz) until it is idle.

    After SIGTERM, proxies also get time to notice that. Uvicorn itself closes its socket at once.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, connections: int, drain_notice_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._connections = connections
        self._drain_notice_s = drain_notice_s
        self._idle_until: asyncio.Future[None] | None = None
        """While a drained server waits for proxies to notice: ends the wait."""
        self._announcement: asyncio.Task[None] | None = None
        self._drain: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and watch the engine: if it dies, the process must end so that it is restarted."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio has set it to the number of connections that it accepts at once
            log.info("listening on %s", url_of(listener))
        service = _service_of(self._app)
        if service is not None:
            loop = asyncio.get_running_loop()
            self._watch = loop.create_task(self._exit_on_death(service.engine))
            addresses = [url_of(listener) for listener in sockets or []]
            self._announcement = loop.create_task(self._announce(service, addresses))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGHUP: the first drains, a second SIGTERM or SIGINT stops at once."""
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        engine = engine_of(self._app)
        if self._drain is not None:
            if number is signal.SIGHUP:  # a closed terminal may send several
                log.info("SIGHUP: requests are already being finished")
                return
            if self._idle_until is not None and not self._idle_until.done():
                log.info("%s again: ending without waiting for proxies to notice", number.name)
                self._idle_until.set_result(None)
                return
            log.warning("%s again: stopping at once, accepted requests are lost", number.name)
            end_process(1)
        elif engine is not None and engine.state is EngineState.STARTING:
            log.info("%s during start-up: ending; nothing was accepted yet", number.name, extra=SHOWN_EARLY)
            end_process(0)  # warm-up cannot be interrupted, and may take minutes
        log.info("%s: finishing accepted requests, refusing new ones", number.name)
        self._drain = asyncio.get_running_loop().create_task(
            # SIGINT and SIGHUP come from a terminal, where no proxy has to notice
            self._drain_then_exit(self._drain_notice_s if number is signal.SIGTERM else 0)
        )

    async def _drain_then_exit(self, notice_s: float) -> None:
        engine = engine_of(self._app)
        if engine is not None:
            loop = asyncio.get_running_loop()
            end = loop.time() + notice_s
            engine.drain()
            await engine.wait_idle()
            self._idle_until = loop.create_future()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle_until, end - loop.time())
        self.should_exit = True

    async def _announce(self, service: ServiceState, addresses: list[str]) -> None:
        await service.engine.reached(EngineState.READY)
        facts = start_up_facts(service, addresses, self._connections)
        log.info("the service is ready", extra={START_UP: facts, SCREEN: start_up_screen(facts)})

    async def _exit_on_death(self, engine: AsyncEngine) -> None:
        await engine.reached(EngineState.DEAD)
        await asyncio.sleep(DEATH_NOTICE_SECONDS)
        self.should_exit = self.force_exit = True  # without waiting for connections or a hanging thread


def end_process(code: int) -> NoReturn:
    """End the process at once, without waiting for other threads; flush the log if possible."""
    logging.shutdown()
    os._exit(code)


def engine_of(app: FastAPI) -> AsyncEngine | None:
    """Return the engine of an app; None before start-up."""
    service = _service_of(app)
    return None if service is None else service.engine


def _service_of(app: FastAPI) -> ServiceState | None:
    state = getattr(app.state, "service", None)
    return state if isinstance(state, ServiceState) else None


def serve(app: FastAPI, settings: Settings) -> bool:
    """Serve until a signal or the death of the engine; return whether the exit was without errors.

    Raises:
        AddressError: the service cannot listen on the configured address.
    """
    sockets = bind(settings.host, settings.port, BACKLOG)
    budget = descriptor_budget()
    log.info("connections: at most %d, from the limit of open files", budget.connections)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # uvicorn would trust X-Forwarded-For of any process on this machine; see door/client.py
        http=limited_protocol(settings.read_timeout_s, settings.write_timeout_s, OpenConnections(budget.connections)),
        ws="none",
        backlog=budget.accepts,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=STRAGGLER_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    DrainingServer(config, app, budget.connections, settings.drain_notice_s).run(sockets)
    service = _service_of(app)
    if service is None:
        return False
    if service.engine.state is EngineState.DEAD:
        if service.tracing is not None:
            service.tracing.close()  # a forced exit skips the lifespan, which would close it
        end_process(1)  # a thread hanging in a library could prevent the interpreter from ending
    return service.engine.state is EngineState.STOPPED
