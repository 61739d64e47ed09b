"""Bodies in memory: their number of bytes is limited together, and each gives its bytes back however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from service.http.door.body import WholeBody
from tests.waiting import eventually, runs

MAX = 100
"""Bytes of a body without given images."""
LARGE = 1000
"""Bytes of all longer bodies together, and of the longest one."""
framing = pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])


class App:
    """Answers with the number of bytes once it may; raises on request. It also ends when the client leaves."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.waiting = 0
        self.error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if self.error is not None:
            raise self.error
        self.waiting += 1
        gone, let = asyncio.ensure_future(receive()), asyncio.ensure_future(self.let.wait())
        await asyncio.wait([gone, let], return_when=asyncio.FIRST_COMPLETED)
        self.waiting -= 1
        if not gone.done():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(len(body)).encode()})
        for future in (gone, let):
            future.cancel()


class Client:
    """A request whose body arrives in parts."""

    def __init__(self, door: WholeBody, declared: int | None = None) -> None:
        headers = [] if declared is None else [(b"content-length", str(declared).encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers}
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._sent: list[MutableMapping[str, Any]] = []
        self.task = asyncio.ensure_future(door(scope, self._parts.get, self._send))

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self._sent.append(message)

    async def part(self, size: int, *, last: bool = True) -> None:
        """Let a part arrive, and wait until it has been read."""
        self._parts.put_nowait({"type": "http.request", "body": bytes(size), "more_body": not last})
        await eventually(self._parts.empty)
        for _ in range(5):
            await asyncio.sleep(0)

    def leave(self) -> None:
        self._parts.put_nowait({"type": "http.disconnect"})

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        await self.task
        start, body = self._sent
        return start["status"], dict(start["headers"]), body["body"]


@asynccontextmanager
async def door() -> AsyncIterator[tuple[WholeBody, App]]:
    app = App()
    yield WholeBody(app, MAX, lambda _: LARGE - MAX, max_large_bytes=LARGE), app


async def all_is_free(body: WholeBody, app: App) -> bool:
    """Return whether a body that takes the whole limit is accepted."""
    app.let.set()
    client = Client(body)
    await client.part(LARGE)
    return (await client.answer())[::2] == (200, str(LARGE).encode())


@framing
@runs
async def test_large_bodies_beyond_the_limit_get_503_until_another_is_answered(declared: bool) -> None:
    async with door() as (body, app):
        waiting = []
        for size in (600, 400):
            waiting.append(Client(body, size if declared else None))
            await waiting[-1].part(size)
        assert app.waiting == 2
        refused = Client(body, MAX + 1 if declared else None)
        await refused.part(MAX + 1)
        status, headers, text = await refused.answer()
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert b"the given images of other requests take all memory for them" in text
        small = Client(body, MAX if declared else None)
        await small.part(MAX)
        assert app.waiting == 3
        app.let.set()
        assert [(await client.answer())[2] for client in (*waiting, small)] == [b"600", b"400", b"100"]
        again = Client(body, MAX + 1 if declared else None)
        await again.part(MAX + 1)
        assert (await again.answer())[0] == 200
        assert await all_is_free(body, app)


@framing
@runs
async def test_bodies_count_while_they_arrive(declared: bool) -> None:
    async with door() as (body, app):
        slow = Client(body, 900 if declared else None)
        await slow.part(MAX, last=False)
        other = Client(body, LARGE if declared else None)
        await other.part(900, last=False)  # the first is still a short one
        await slow.part(1, last=False)
        # It is refused, and takes no memory while the rest arrives: a client that is cut off would get no answer
        assert not slow.task.done()
        await other.part(100)
        await slow.part(799)
        assert (await slow.answer())[0] == 503
        assert app.waiting == 1
        app.let.set()
        assert (await other.answer())[0] == 200
        assert await all_is_free(body, app)


@framing
@runs
async def test_a_refused_body_is_dropped_before_its_rest_arrives(declared: bool) -> None:
    async with door() as (body, app):
        waiting = Client(body, 600 if declared else None)
        await waiting.part(600)
        refused = Client(body, 900 if declared else None)
        await refused.part(300, last=False)
        await refused.part(200, last=False)
        another = Client(body, 400 if declared else None)
        await another.part(400)
        assert app.waiting == 2
        refused.leave()
        await refused.task
        app.let.set()
        assert [(await client.answer())[0] for client in (waiting, another)] == [200, 200]
        assert await all_is_free(body, app)


@framing
@runs
async def test_a_client_that_leaves_gives_its_bytes_back(declared: bool) -> None:
    async with door() as (body, app):
        arriving = Client(body, LARGE if declared else None)
        await arriving.part(500, last=False)
        waiting = Client(body, 500 if declared else None)
        await waiting.part(500)
        assert app.waiting == 1
        for client in (arriving, waiting):
            client.leave()
            await client.task
        assert await all_is_free(body, app)


@framing
@runs
async def test_a_body_that_is_too_long_by_itself_gets_413_and_gives_its_bytes_back(declared: bool) -> None:
    async with door() as (body, app):
        client = Client(body, LARGE + 1 if declared else None)
        if not declared:  # a declared one is refused before it is read
            await client.part(LARGE, last=False)
            await client.part(1, last=False)
        status, _, text = await client.answer()
        assert (status, f"at most {LARGE} bytes".encode() in text) == (413, True)
        assert await all_is_free(body, app)


@runs
async def test_a_request_that_fails_gives_its_bytes_back() -> None:
    async with door() as (body, app):
        app.error = RuntimeError("a route raised")
        client = Client(body)
        await client.part(LARGE)
        with pytest.raises(RuntimeError, match="a route raised"):
            await client.task
        app.error = None
        assert await all_is_free(body, app)
