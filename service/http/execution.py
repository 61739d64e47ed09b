"""What all interfaces do with a validated body: submit it, wait or follow, let go of it, encode what came of it.

Whatever ends the waiting early frees the rows at the next step: a client that goes away, an image that fails, a limit.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from fastapi import Request
from starlette.types import Receive

from service.engine.events import Event, ImageFailed
from service.engine.request import GenerationRequest, ImageParams, ImageResult, Watch
from service.engine.tickets import Ticket
from service.errors import Aborted, InvalidRequest, TimedOut
from service.http.door.idempotency import derived_seed
from service.http.native.schemas import Timing
from service.http.state import ServiceState, asking_client
from service.models.served_model import ServedModel, find_model
from service.requests.completion import complete
from service.requests.generate_request import GenerateRequest

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A request that is valid and complete, and that the engine has not seen."""

    model: ServedModel
    request: GenerationRequest
    idempotent: bool
    """Whether it carries an Idempotency-Key."""


@dataclass(frozen=True)
class Accepted:
    """A request that the engine has taken."""

    model: ServedModel
    ticket: Ticket

    @property
    def images(self) -> tuple[ImageParams, ...]:
        """What each image is made from."""
        return self.ticket.request.images

    def server_timing(self, results: list[ImageResult], encode_s: float) -> str:
        """Return the value of the header Server-Timing: milliseconds in the queue, of sampling, and of encoding."""
        begun = min(result.queue_s for result in results)
        done = max(result.queue_s + result.compute_s for result in results)
        phases = {"queue": begun, "denoise": done - begun, "encode": encode_s}
        return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in phases.items())

    def timing(self, results: list[ImageResult]) -> Timing:
        """Compare what was predicted on admission with what it came to; all images are done."""
        predicted = self.ticket.prediction
        return Timing(
            images_ahead=predicted.position,
            predicted_wait_s=round(predicted.wait_s, 6),
            wait_s=round(min(result.queue_s for result in results), 6),
            predicted_finish_s=round(predicted.finish_s, 6),
            finish_s=round(time.monotonic() - self.ticket.submitted_at, 6),
        )


def prepare(body: GenerateRequest, request: Request, state: ServiceState) -> Prepared:
    """Complete a body by its model, and by who asks.

    Raises:
        InvalidRequest: naming field, rule and allowed values.
        UnknownModel: no such model.
    """
    model, client = find_model(state.models, body.model), asking_client(request)
    key = getattr(request.state, "idempotency_key", None)
    if key is not None and body.seed is None:
        body = body.model_copy(update={"seed": derived_seed(client.name, key)})
    most = min(state.settings.max_row_steps, client.limits.row_steps_per_request or sys.maxsize)
    # An id of our own: two clients may send the same X-Request-ID
    completed = complete(body, model, uuid.uuid4().hex, most, client.name)
    limited = replace(completed, max_client_images=client.limits.images_in_flight)
    return Prepared(model, limited, idempotent=key is not None)


def submit(prepared: Prepared, state: ServiceState, watch: Watch | None = None) -> Accepted:
    """Hand a request to the engine.

    Args:
        prepared: what is asked for.
        state: the service.
        watch: what `follow` is to tell; None for requests that are waited for.

    Raises:
        DeadlineUnmeetable: it would not be done in time.
        InvalidRequest: more images than could ever be in flight; a stream with an Idempotency-Key.
        Unavailable: the service cannot take it now; says when to try again.
    """
    if prepared.idempotent and watch is not None:
        raise InvalidRequest("Idempotency-Key", "a stream cannot be answered twice; leave it out, and give a seed")
    ticket = state.engine.submit(replace(prepared.request, watch=watch))
    if state.tracing is not None:
        state.tracing.follow(ticket, prepared.model.numerics_id)
    return Accepted(prepared.model, ticket)


async def wait(ticket: Ticket, request: Request, state: ServiceState) -> list[ImageResult]:
    """Wait for all images, in order.

    Raises:
        GenerationFailed: an image failed, the engine stopped, it took too long, or the client went away.
    """
    longest = state.settings.max_request_s
    images = asyncio.gather(*ticket.images)
    images.add_done_callback(_retrieve)
    gone: asyncio.Future[None] = asyncio.ensure_future(disconnected(request.receive))
    try:
        either: list[asyncio.Future[Any]] = [images, gone]
        done, _ = await asyncio.wait(either, timeout=longest, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise _timed_out(longest)
        if not images.done():
            raise Aborted("the client closed the connection")
        return images.result()
    finally:
        gone.cancel()
        _abandon(ticket, state)


async def follow(ticket: Ticket, state: ServiceState) -> AsyncGenerator[Event]:
    """Yield the events of a request that was submitted with a watch, up to `Completed`.

    Close it (`contextlib.aclosing`) when the reader goes away: that is what frees the rows.

    Raises:
        GenerationFailed: an image failed, the engine stopped, or it took too long.
        RuntimeError: nobody said what to watch.
    """
    if ticket.events is None:
        raise RuntimeError("only requests that were submitted with a watch have events")
    longest = state.settings.max_request_s
    try:
        while True:
            async with asyncio.timeout(ticket.submitted_at + longest - time.monotonic()):
                event = await anext(ticket.events, None)
            if event is None:
                return
            if isinstance(event, ImageFailed):
                raise event.error
            yield event
    except TimeoutError as error:
        raise _timed_out(longest) from error
    finally:
        _abandon(ticket, state)


async def encode_answer(state: ServiceState, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make an answer, or a part of it, of what came of a request: off the event loop, and told to who traces."""
    with nullcontext() if state.tracing is None else state.tracing.encoding():
        return await state.encoding.run(function, *args, **kwargs)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone; the body has been read, so that is all there is left to receive."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _abandon(ticket: Ticket, state: ServiceState) -> None:
    if not all(future.done() for future in ticket.images):
        for future in ticket.images:
            future.cancel()
        state.engine.abort(ticket.request.request_id)


def _retrieve(images: asyncio.Future[list[ImageResult]]) -> None:
    """Look at the outcome, which nobody else does once the client has gone."""
    if not images.cancelled():
        images.exception()


def _timed_out(longest: float) -> TimedOut:
    return TimedOut(f"the images were not done within {longest:g} s, the longest that the service allows")
