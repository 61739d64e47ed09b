"""Connections of slow clients end; real sockets, a server of a few lines."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import wraps

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.api.body import WholeBody
from service.api.connection import timed_protocol
from service.api.observe import Observe
from service.api.security_headers import SECURITY_HEADERS
from service.metrics import OUTCOMES, Metrics

HOUR = 3600.0
LONG_ANSWER = 64 << 20
"""Bytes: more than the sockets' buffers of any kernel hold."""
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"


class App:
    """Answers `long` at length and everything else shortly, once the body is there; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.seen.append(scope["path"])
        body = bytes(LONG_ANSWER) if scope["path"] == "/long" else b"ok"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in (body, b""):
            await send({"type": "http.response.body", "body": part, "more_body": bool(part)})
        self.ended.set()


Connect = Callable[[], Coroutine[object, object, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@asynccontextmanager
async def serving(
    app: App, read_seconds: float = HOUR, write_seconds: float = HOUR, metrics: Metrics | None = None
) -> AsyncIterator[Connect]:
    observed = Observe(WholeBody(app, max_bytes=100), metrics or Metrics())
    config = uvicorn.Config(observed, http=timed_protocol(read_seconds, write_seconds), lifespan="off", log_config=None)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))  # serve() would take the test's signals
    while not server.started:
        await asyncio.sleep(0.001)
    try:
        yield lambda: asyncio.open_connection(*listener.getsockname(), limit=4 << 20)
    finally:
        server.should_exit = server.force_exit = True
        await task
        listener.close()


def runs(test: Callable[[], Coroutine[object, object, None]]) -> Callable[[], None]:
    """Run a test's coroutine, and fail rather than hang."""

    @wraps(test)
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), timeout=120))

    return run


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", POST + b"1234"])
def test_a_request_that_does_not_arrive_is_ended(sent: bytes) -> None:
    @runs
    async def check() -> None:
        app = App()
        async with serving(app, read_seconds=0.2) as connect:
            reader, writer = await connect()
            writer.write(sent)
            answer = await reader.read()  # to the end: the connection is closed
            writer.close()
        assert app.seen == []
        assert bool(answer) == bool(sent)  # nothing asked, nothing answered
        if sent:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nConnection: close" in head
            assert all(f"\r\n{name}: {value}".encode() in head for name, value in SECURITY_HEADERS.items())
            assert json.loads(body)["detail"] == "the request did not arrive within 0.2 s"

    check()


@runs
async def test_a_request_whose_body_does_not_arrive_is_named_and_counted_as_what_it_was_told() -> None:
    metrics = Metrics()
    async with serving(App(), read_seconds=0.2, metrics=metrics) as connect:
        for _ in range(2):
            reader, writer = await connect()
            writer.write(POST.replace(b" / ", b" /v1/generate ").replace(b"Host", b"X-Request-ID: mine\r\nHost"))
            head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nX-Request-ID: mine" in head
    value = metrics.registry.get_sample_value
    counted = {outcome: value("iddpm_requests_total", {"outcome": outcome}) for outcome in OUTCOMES}
    assert counted == dict.fromkeys(OUTCOMES, 0) | {"invalid": 2}


@runs
async def test_what_follows_an_answer_and_does_not_arrive_is_not_called_by_its_name() -> None:
    async with serving(App(), read_seconds=0.2) as connect:
        reader, writer = await connect()
        writer.write(POST.replace(b"Host", b"X-Request-ID: mine\r\nHost") + b"12345" + POST[:10])
        first, second = (await reader.read()).split(b"HTTP/1.1 408 ")
        writer.close()
    assert b"mine" in first
    assert b"X-Request-ID" not in second


@runs
async def test_a_byte_now_and_then_buys_no_time() -> None:
    app = App()
    async with serving(app, read_seconds=0.2) as connect:
        reader, writer = await connect()
        ended = asyncio.ensure_future(reader.read())
        while not ended.done():
            writer.write(b"G")
            await asyncio.sleep(0.01)
        with suppress(ConnectionError):  # who still writes when the connection closes may miss the answer
            assert ended.result().startswith(b"HTTP/1.1 408 ")
        writer.close()
    assert app.seen == []


@runs
async def test_the_second_request_of_a_connection_has_a_limit_too() -> None:
    app = App()
    async with serving(app, read_seconds=0.2) as connect:
        for second in (POST[:10], POST + b"12"):
            reader, writer = await connect()
            writer.write(POST + b"12345" + second)  # its beginning comes with the first, before that is answered
            answers = await reader.read()
            assert answers.startswith(b"HTTP/1.1 200 ")
            assert b"HTTP/1.1 408 " in answers
            writer.close()
    assert app.seen == ["/", "/"]


@runs
async def test_a_connection_between_two_requests_is_not_a_slow_one() -> None:
    async with serving(App(), read_seconds=0.05) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(POST + b"12345")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.15)
        assert not reader.at_eof()
        writer.close()


@runs
async def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    app = App()
    async with serving(app, write_seconds=0.2) as connect:
        reader, writer = await connect()
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.ended.wait()  # what waited for it to read goes on
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(LONG_ANSWER)
        writer.close()


@runs
async def test_a_client_that_reads_slowly_gets_its_answer() -> None:
    app = App()
    async with serving(app, write_seconds=1) as connect:
        reader, writer = await connect()
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        got = 0
        while got < LONG_ANSWER:
            got += len(await reader.read(8 << 20))
            await asyncio.sleep(0.01)
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot a size\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    ],
)
def test_what_is_no_request_is_answered_with_a_problem_and_closed(sent: bytes) -> None:
    @runs
    async def check() -> None:
        app = App()
        async with serving(app) as connect:
            reader, writer = await connect()
            writer.write(sent)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
        assert app.seen == []
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nContent-Type: application/problem+json" in head
        assert b"\r\nserver:" not in head.lower()
        assert json.loads(body)["status"] == 400

    check()


@runs
async def test_a_body_that_turns_into_garbage_after_its_answer_ends_the_connection() -> None:
    async with serving(App()) as connect:
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n80\r\n" + b"a" * 128 + b"\r\n")
        assert b"HTTP/1.1 413 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"garbage\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
