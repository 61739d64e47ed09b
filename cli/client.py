"""The Python client: `Client` waits, `AsyncClient` awaits; both do the same, which is in `client_core` and `retries`.

from cli.client import Client, pixels_of

with Client("http://127.0.0.1:8000") as client:
    answer = client.generate(class_="sneaker", n=8, seed=3, on_event=print)
    pixels = [pixels_of(image.b64_json) for image in answer.images]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Self, Unpack

import httpx

from cli.client_core import (
    Call,
    ClientError,
    ConnectionLost,
    Event,
    Following,
    GenerateFields,
    RequestFailed,
    UnexpectedAnswer,
    as_client_errors,
    failure_of,
    generate_call,
    models_call,
    pixels_of,
    read_generated,
    read_models,
    refuse_other_streams,
    stream_call,
)
from cli.connecting import connection
from cli.retries import Outcome, Retries
from service.http.native.event_schemas import PreviewEvent, ProgressEvent, QueuedEvent
from service.http.native.schemas import GeneratedImage, GenerateResponse, ModelInfo

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "ConnectionLost",
    "Event",
    "GenerateFields",
    "GenerateResponse",
    "GeneratedImage",
    "ModelInfo",
    "PreviewEvent",
    "ProgressEvent",
    "QueuedEvent",
    "RequestFailed",
    "UnexpectedAnswer",
    "pixels_of",
]

PATIENCE_S = 60.0


class Client:
    """A service at some address; close it, or use it as a context manager.

    Requests that were refused (429, 503) or found nobody are sent again, after the Retry-After that came with it;
    requests whose connection broke, where that is safe.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience_s: float = PATIENCE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connect with the first request, not yet.

        Args:
            url: of the service, http://HOST[:PORT].
            key: API key, where the service wants one.
            patience_s: longest time spent on pauses before a request is sent again, in all; 0: never again.
            transport: instead of the network, for tests.

        Raises:
            ValueError: an address or a key that cannot be one, or a variable of the environment that the connection
                depends on (proxies, certificates) and that cannot be used.
        """
        to = connection(url, key, direct=transport is not None)
        self._http = httpx.Client(**to.options, transport=transport)
        self._name = to.name
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def models(self) -> list[ModelInfo]:
        """Return the served models, the default one first.

        Raises:
            ClientError: there was no such answer.
        """
        return read_models(self._send(models_call())).models

    def generate(
        self,
        *,
        on_event: Callable[[Event], object] | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[GenerateFields],
    ) -> GenerateResponse:
        """Generate images.

        Args:
            on_event: is told how they come about: queued, progress, and previews with `preview_every`. What it raises
                ends the request, and frees its rows.
            idempotency_key: the same for requests that mean the same; drawn if there is none. Not with `on_event`:
                a stream cannot be answered twice. Give a seed instead, and send it again yourself.
            **fields: what is asked for.

        Raises:
            RequestFailed: the service said no, or could not.
            ConnectionLost: there was no connection, or it ended before the answer did.
            UnexpectedAnswer: what answers there is not this service.
            ValueError: a field that JSON cannot hold, an Idempotency-Key that cannot be one, or one for a stream.
        """
        if on_event is None:
            return read_generated(self._send(generate_call(fields, idempotency_key)))
        following = Following(on_event)
        response = self._send(stream_call(fields, idempotency_key))
        with closing(self._chunks(response)) as chunks:
            for chunk in chunks:
                following.feed(chunk)
        return following.answer()

    def _chunks(self, response: httpx.Response) -> Generator[bytes]:
        with as_client_errors(self._name):  # not around what is called with events: its errors are the caller's
            try:
                refuse_other_streams(response)
                yield from response.iter_bytes()
            finally:
                response.close()

    def _send(self, call: Call) -> httpx.Response:
        """Send a request, again where that is safe; return its good answer."""
        with as_client_errors(self._name):
            return self._send_until_answered(call)

    def _send_until_answered(self, call: Call) -> httpx.Response:
        retries = Retries(self._patience_s, repeatable=call.repeatable)
        while True:
            outcome: Outcome
            try:
                outcome = self._http.send(call.request(self._http), stream=call.streamed)
            except httpx.TransportError as error:
                outcome = error
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            if isinstance(outcome, httpx.Response) and call.streamed:
                outcome.read()
            pause_s = retries.pause_after(outcome)
            if pause_s is None:
                raise failure_of(outcome)
            time.sleep(pause_s)


class AsyncClient:
    """As `Client`, with `await` and `async with`; `on_event` is called, not awaited."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience_s: float = PATIENCE_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        to = connection(url, key, direct=transport is not None)
        self._http = httpx.AsyncClient(**to.options, transport=transport)
        self._name = to.name
        self._patience_s = patience_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def models(self) -> list[ModelInfo]:
        """See `Client.models`."""
        return read_models(await self._send(models_call())).models

    async def generate(
        self,
        *,
        on_event: Callable[[Event], object] | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[GenerateFields],
    ) -> GenerateResponse:
        """See `Client.generate`; cancelling it frees its rows."""
        if on_event is None:
            return read_generated(await self._send(generate_call(fields, idempotency_key)))
        following = Following(on_event)
        response = await self._send(stream_call(fields, idempotency_key))
        async with aclosing(self._chunks(response)) as chunks:
            async for chunk in chunks:
                following.feed(chunk)
        return following.answer()

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        with as_client_errors(self._name):
            try:
                refuse_other_streams(response)
                async for chunk in response.aiter_bytes():
                    yield chunk
            finally:
                await response.aclose()

    async def _send(self, call: Call) -> httpx.Response:
        with as_client_errors(self._name):
            return await self._send_until_answered(call)

    async def _send_until_answered(self, call: Call) -> httpx.Response:
        retries = Retries(self._patience_s, repeatable=call.repeatable)
        while True:
            outcome: Outcome
            try:
                outcome = await self._http.send(call.request(self._http), stream=call.streamed)
            except httpx.TransportError as error:
                outcome = error
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            if isinstance(outcome, httpx.Response) and call.streamed:
                await outcome.aread()
            pause_s = retries.pause_after(outcome)
            if pause_s is None:
                raise failure_of(outcome)
            await asyncio.sleep(pause_s)
