"""The Python client: `Client` blocks, `AsyncClient` awaits; `client_core` and `retries` hold what both share.

from cli.client import Client, arrays_of

with Client("http://127.0.0.1:8000") as client:
    answer = client.generate(class_="sneaker", n=8, seed=3, on_event=print)
    pixels = arrays_of(answer)
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
    Denoised,
    DenoiseFields,
    Encoded,
    EncodeFields,
    Event,
    Following,
    GenerateFields,
    RequestFailed,
    UnexpectedAnswer,
    arrays_of,
    as_client_errors,
    denoise_call,
    encode_call,
    failure_of,
    generate_call,
    models_call,
    pixels_of,
    read_denoised,
    read_encoded,
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
    "DenoiseFields",
    "Denoised",
    "EncodeFields",
    "Encoded",
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
    "arrays_of",
    "pixels_of",
]

PATIENCE_S = 60.0
MAX_CONNECTIONS = 100


class Client:
    """A client of the service at a URL. Close it, or use it as a context manager.

    A request is sent again if it was refused (429, 503; after Retry-After), or if no connection could be made. After a
    connection broke, it is sent again only if that is safe.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience_s: float = PATIENCE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Create the client; it connects with the first request.

        Args:
            url: of the service, http://HOST[:PORT].
            key: API key, if the service needs one.
            patience_s: most seconds to wait in total before retries of a request; 0: no retries.
            transport: replaces the network, for tests.

        Raises:
            ValueError: the URL, the key, or an environment variable for proxies or certificates is invalid.
        """
        to = connection(url, key, direct=transport is not None)
        self._http = httpx.Client(**to.options, transport=transport)
        self.name = to.name
        """The service in messages, without secrets."""
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[ModelInfo]:
        """Return the served models, the default one first.

        Raises:
            ClientError: the request failed.
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
            on_event: called with each event: queued, progress, and previews if `preview_every` is set. If it raises an
                exception, the request is cancelled and its rows are freed.
            idempotency_key: equal for repetitions of the same request; a random one if None. Not allowed with
                `on_event`, because a stream cannot be repeated: give a seed instead, and repeat the request yourself.
            **fields: the fields of the request.

        Raises:
            RequestFailed: the service refused the request or failed.
            ConnectionLost: there was no connection, or it ended before the response did.
            UnexpectedAnswer: the response does not come from this service.
            ValueError: JSON cannot hold a field, the Idempotency-Key is invalid, or it is given for a stream.
        """
        if on_event is None:
            return read_generated(self._send(generate_call(fields, idempotency_key)))
        following = Following(on_event)
        response = self._send(stream_call(fields, idempotency_key))
        try:
            with closing(self._chunks(response)) as chunks:
                for chunk in chunks:
                    following.feed(chunk)
        except ConnectionLost:
            if not following.answered:
                raise
        return following.answer()

    def encode(self, **fields: Unpack[EncodeFields]) -> Encoded:
        """Encode images into latents.

        Raises:
            RequestFailed: the service refused the request or failed.
            ConnectionLost: there was no connection, or it ended before the response did.
            UnexpectedAnswer: the response does not come from this service.
            ValueError: JSON cannot hold a field.
        """
        return read_encoded(self._send(encode_call(fields)))

    def denoise(self, **fields: Unpack[DenoiseFields]) -> Denoised:
        """Call the network once for each of the given arrays.

        Raises:
            RequestFailed: the service refused the request or failed.
            ConnectionLost: there was no connection, or it ended before the response did.
            UnexpectedAnswer: the response does not come from this service.
            ValueError: JSON cannot hold a field.
        """
        return read_denoised(self._send(denoise_call(fields)))

    def _chunks(self, response: httpx.Response) -> Generator[bytes]:
        with as_client_errors(self.name):  # not around on_event, whose exceptions are the caller's
            try:
                refuse_other_streams(response)
                yield from response.iter_bytes()
            finally:
                response.close()

    def _send(self, call: Call) -> httpx.Response:
        """Send a request, with retries; return the successful response."""
        with as_client_errors(self.name):
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
    """Like `Client`, with `await` and `async with`; `on_event` is called, not awaited."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        patience_s: float = PATIENCE_S,
        max_connections: int | None = MAX_CONNECTIONS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Create the client; see `Client` for the other arguments.

        Args:
            url: of the service.
            key: API key.
            patience_s: see `Client`.
            max_connections: number of requests that are sent at once, the others wait for a connection; None: no limit.
            transport: replaces the network, for tests.

        Raises:
            ValueError: see `Client`.
        """
        to = connection(url, key, direct=transport is not None)
        limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        self._http = httpx.AsyncClient(**to.options, limits=limits, transport=transport)
        self.name = to.name
        """The service in messages, without secrets."""
        self._patience_s = patience_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
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
        """See `Client.generate`; cancelling the task frees the request's rows."""
        if on_event is None:
            return read_generated(await self._send(generate_call(fields, idempotency_key)))
        following = Following(on_event)
        response = await self._send(stream_call(fields, idempotency_key))
        try:
            async with aclosing(self._chunks(response)) as chunks:
                async for chunk in chunks:
                    following.feed(chunk)
        except ConnectionLost:
            if not following.answered:
                raise
        return following.answer()

    async def encode(self, **fields: Unpack[EncodeFields]) -> Encoded:
        """See `Client.encode`."""
        return read_encoded(await self._send(encode_call(fields)))

    async def denoise(self, **fields: Unpack[DenoiseFields]) -> Denoised:
        """See `Client.denoise`."""
        return read_denoised(await self._send(denoise_call(fields)))

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        with as_client_errors(self.name):
            try:
                refuse_other_streams(response)
                async for chunk in response.aiter_bytes():
                    yield chunk
            finally:
                await response.aclose()

    async def _send(self, call: Call) -> httpx.Response:
        with as_client_errors(self.name):
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
