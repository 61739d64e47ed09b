"""The engine in a separate process: a prototype, for comparison with the service's thread.

It uses the same engine and the same dataclasses, pickled over a pipe, and omits the other tasks of
`service.engine.async_engine`: admission, predictions, aborts, the watchdog. The comparison therefore favours the
process.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from service.engine.engine import Engine
from service.engine.request import GenerationRequest, ImageResult


def run_engine(make: Callable[[], Engine], pipe: Connection) -> None:
    """Receive (request, submitted_at) from a pipe, or None to end; send lists of results back."""
    engine = make()
    engine.warm_up()
    pipe.send([])
    while True:
        while not engine.has_work() or pipe.poll():
            command: tuple[GenerationRequest, float] | None = pipe.recv()
            if command is None:
                return
            engine.add(*command)
        results = engine.step()
        if results:
            pipe.send(results)


class EngineProcess:
    """Owns the process. Only the event loop that started it calls its methods; starting waits for the warm-up."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_engine, args=(make, theirs))
        self._process.start()
        theirs.close()
        self._pipe.recv()
        self._futures: dict[str, asyncio.Future[ImageResult]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pipe.fileno(), self._receive)

    def submit(self, request: GenerationRequest) -> asyncio.Future[ImageResult]:
        """Send a request of one image."""
        future = self._futures[request.request_id] = self._loop.create_future()
        self._pipe.send((request, time.monotonic()))
        return future

    def stop(self) -> None:
        """End the process, which must be idle."""
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.send(None)
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _receive(self) -> None:
        for result in self._pipe.recv():
            self._futures.pop(result.request_id).set_result(result)
