"""The path of a generation request that all interfaces share: prepare, submit, wait or stream, encode, count.

An interface turns its own body into a `GenerateRequest` and calls `prepare`, then `answer_when_done` or
`answer_as_stream`. It supplies the encoding only.
If the client disconnects, an image fails or a time limit passes, the images of the request are aborted; their rows are
free at the next step.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response

from diffusion.quoting import quoted
from formats.value_range import value_range_of
from service.engine.events import Event, ImageFailed
from service.engine.request import GenerationRequest, GivenArrays, ImageParams, ImageResult, Watch
from service.engine.tickets import Ticket
from service.errors import Aborted, GenerationFailed, InvalidRequest, TimedOut
from service.http.client_gone import disconnected
from service.http.door.client import Client
from service.http.door.context import client_of_request, context_of, ended_as
from service.http.door.idempotency import derived_seed
from service.http.event_source import EventSource
from service.http.faults import Fault
from service.http.native.schemas import Timing
from service.http.problems import fault_of
from service.http.state import ServiceState
from service.models.served_model import ServedModel, find_model
from service.requests.array_requests import DenoiseRequest, EncodeRequest, complete_arrays, read_encoded, read_noisy
from service.requests.completion import complete
from service.requests.generate_request import GenerateRequest
from service.requests.given import check_cond, check_given, read_given
from service.requests.results import Pixels, output_of

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A valid and complete request that has not been submitted."""

    model: ServedModel
    request: GenerationRequest
    idempotent: bool
    """Whether it carries an Idempotency-Key."""


@dataclass(frozen=True)
class Accepted:
    """A request that the engine has accepted."""

    model: ServedModel
    ticket: Ticket

    @property
    def images(self) -> tuple[ImageParams, ...]:
        """The parameters of each image; of a cascade, those of its base."""
        return self.ticket.request.images

    def pixels(self, result: ImageResult) -> Pixels:
        """Return a finished image, [H, W, C]."""
        params = self.ticket.request.results[result.position]
        return output_of(params, result, value_range_of(self.model.result_config))

    def timing(self, results: list[ImageResult]) -> Timing:
        """Return the times predicted at admission and the actual ones, up to now; all images must be done."""
        predicted = self.ticket.prediction
        return Timing(
            images_ahead=predicted.position,
            predicted_wait_s=round(predicted.wait_s, 6),
            wait_s=round(min(result.queue_s for result in results), 6),
            predicted_finish_s=round(predicted.finish_s, 6),
            finish_s=round(time.monotonic() - self.ticket.submitted_at, 6),
        )


@dataclass(frozen=True)
class Finished:
    """An accepted request whose images are all done."""

    accepted: Accepted
    results: list[ImageResult]
    """In the order of the request."""
    timing: Timing


@dataclass(frozen=True)
class Answered:
    """The encoded answer to a request, and the time of each phase."""

    response: Response
    finished: Finished
    encode_s: float

    @property
    def server_timing(self) -> str:
        """The value of the header Server-Timing: milliseconds of queue, sampling and encoding."""
        results = self.finished.results
        begun = min(result.queue_s for result in results)
        done = max(result.queue_s + result.compute_s for result in results)
        phases = {"queue": begun, "denoise": done - begun, "encode": self.encode_s}
        return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in phases.items())


class EventWriter(Protocol):
    """Writes the events of one stream in the form of an interface."""

    async def event(self, event: Event) -> bytes | None:
        """Return the framed event, or None if the interface does not show events of this kind."""
        ...

    def failure(self, fault: Fault) -> bytes:
        """Return the framed event that ends a failed stream."""
        ...


async def prepare(body: GenerateRequest, request: Request, state: ServiceState) -> Prepared:
    """Complete a body with the model's defaults and the client's limits. Given images are read in the encoding pool.

    Raises:
        InvalidRequest: a field breaks a rule; names the field, the rule and the allowed values.
        UnknownModel: no such model.
    """
    model, client = find_model(state.models, body.model), client_of_request(request.scope)
    key = context_of(request.scope).idempotency_key
    if key is not None and body.seed is None:
        body = body.model_copy(update={"seed": derived_seed(client.name, key)})
    most = _most_work(state, client)
    # Not X-Request-ID, which two clients may share
    check_given(body)
    check_cond(body.cond, model.config.model)
    given: tuple[GivenArrays, ...] = ()
    if body.image is not None or body.latent is not None or body.cond is not None:
        given = await state.encoding.run(read_given, body, model.config)
        if find_model(state.models, body.model) is not model:  # reloaded meanwhile
            return await prepare(body, request, state)
    completed = complete(body, model, uuid.uuid4().hex, most, client.name, given)
    limited = replace(completed, max_client_images=client.limits.images_in_flight)
    return Prepared(model, limited, idempotent=key is not None)


async def prepare_arrays(body: EncodeRequest | DenoiseRequest, request: Request, state: ServiceState) -> Prepared:
    """Complete a request for arrays of the network, as `prepare` does one for images.

    Raises:
        InvalidRequest: a field breaks a rule; names the field, the rule and the allowed values.
        UnknownModel: no such model.
    """
    model, client = find_model(state.models, body.model), client_of_request(request.scope)
    if model.stages is not None:
        base, upsampler = (quoted(stage.name) for stage in model.stages)
        raise InvalidRequest("model", f"must be one model; {quoted(model.name)} is a cascade of {base} and {upsampler}")
    most = _most_work(state, client)
    check_cond(body.cond, model.config.model)
    if isinstance(body, EncodeRequest):
        given = await state.encoding.run(read_encoded, body, model.config)
    else:
        given = await state.encoding.run(read_noisy, body, model.config)
    if find_model(state.models, body.model) is not model:  # reloaded meanwhile
        return await prepare_arrays(body, request, state)
    completed = complete_arrays(body, given, model, uuid.uuid4().hex, most, client.name)
    limited = replace(completed, max_client_images=client.limits.images_in_flight)
    return Prepared(model, limited, idempotent=context_of(request.scope).idempotency_key is not None)


def _most_work(state: ServiceState, client: Client) -> int:
    """Return the most row steps of a request of a client."""
    return min(state.settings.max_row_steps, client.limits.row_steps_per_request or sys.maxsize)


async def answer_when_done(
    prepared: Prepared, request: Request, state: ServiceState, encode: Callable[[Finished], Response]
) -> Answered:
    """Submit a request, wait for its images and encode the answer.

    Args:
        prepared: the request.
        request: the HTTP request; waiting ends when its client disconnects.
        state: the service.
        encode: builds the answer; called in a thread of the encoding pool.

    Raises:
        ServiceError: the engine refused the request (see `AsyncEngine.submit`), an image failed, the engine stopped,
            the time limit passed, or the client disconnected.
    """
    accepted = _submit(prepared, state, None)
    results = await _wait(accepted.ticket, request, state)
    finished = Finished(accepted, results, accepted.timing(results))
    begun = time.monotonic()
    response = await deliver(state, len(results), encode, finished)
    return Answered(response, finished, time.monotonic() - begun)


def answer_as_stream(
    prepared: Prepared,
    watch: Watch,
    request: Request,
    state: ServiceState,
    writer_of: Callable[[Accepted], EventWriter],
) -> Response:
    """Submit a request and return an answer that streams its events.

    Args:
        prepared: the request.
        watch: which progress and previews to stream.
        request: the HTTP request.
        state: the service.
        writer_of: creates the writer of the events.

    Raises:
        ServiceError: the engine refused the request (see `AsyncEngine.submit`), or it has an Idempotency-Key. Later
            errors are events of the stream.
    """
    if prepared.idempotent:
        raise InvalidRequest("Idempotency-Key", "a stream cannot be answered twice; leave it out, and give a seed")
    accepted = _submit(prepared, state, watch)
    events = _written_events(accepted, writer_of(accepted), request, state)
    # A timer: while a slow client reads an event, nothing waits for the next one
    abandon = partial(_abandon, accepted.ticket, state)
    timer = asyncio.get_running_loop().call_later(state.settings.max_request_s, abandon)

    def end() -> None:
        timer.cancel()
        abandon()

    return EventSource(events, on_end=end)


async def deliver(state: ServiceState, images: int, encode: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Encode finished images in the encoding pool, measure that, and count them as delivered.

    Args:
        state: the service.
        images: number of encoded images.
        encode: called in a thread of the pool.
        *args: positional arguments of `encode`.
        **kwargs: keyword arguments of `encode`.
    """
    begun = time.monotonic()
    with nullcontext() if state.tracing is None else state.tracing.encoding():
        encoded = await state.encoding.run(encode, *args, **kwargs)
    state.metrics.encode_seconds.observe(time.monotonic() - begun)
    state.metrics.images.inc(images)
    return encoded


def _submit(prepared: Prepared, state: ServiceState, watch: Watch | None) -> Accepted:
    ticket = state.engine.submit(replace(prepared.request, watch=watch, longest_s=state.settings.max_request_s))
    if state.tracing is not None:
        state.tracing.follow(ticket, prepared.model.numerics_id)
    return Accepted(prepared.model, ticket)


async def _wait(ticket: Ticket, request: Request, state: ServiceState) -> list[ImageResult]:
    """Wait for all images and return them in order."""
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


async def _written_events(
    accepted: Accepted, writer: EventWriter, request: Request, state: ServiceState
) -> AsyncGenerator[bytes]:
    """Yield the framed events of a stream. Closing the generator aborts the request."""
    try:
        async with aclosing(_events(accepted.ticket, state)) as events:
            async for event in events:
                written = await writer.event(event)
                if written is not None:
                    yield written
    except GenerationFailed as error:
        fault = fault_of(error, request)
        ended_as(request.scope, fault.status)
        yield writer.failure(fault)


async def _events(ticket: Ticket, state: ServiceState) -> AsyncGenerator[Event]:
    """Yield the events of a request up to `Completed`.

    Raises:
        GenerationFailed: an image failed, or the request was abandoned because time ran out.
    """
    assert ticket.events is not None  # noqa: S101  # submitted with a watch
    try:
        async for event in ticket.events:
            if isinstance(event, ImageFailed):
                raise event.error
            yield event
        if any(future.cancelled() for future in ticket.images):
            raise _timed_out(state.settings.max_request_s)
    finally:
        _abandon(ticket, state)


def _abandon(ticket: Ticket, state: ServiceState) -> None:
    """Abort a request unless all its images have ended or it has been aborted already."""
    if not all(future.done() for future in ticket.images):
        for future in ticket.images:
            future.cancel()
        state.engine.abort(ticket.request.request_id)


def _retrieve(images: asyncio.Future[list[ImageResult]]) -> None:
    """Retrieve the outcome, so that asyncio does not log it as never retrieved after a disconnect."""
    if not images.cancelled():
        images.exception()


def _timed_out(longest: float) -> TimedOut:
    return TimedOut(f"the images were not done within {longest:g} s, the longest that the service allows")
