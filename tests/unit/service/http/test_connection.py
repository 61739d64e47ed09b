"""Connections of slow clients are closed, those of half-closed ones are not; real sockets and a small server."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.http.client_gone import disconnected
from service.http.door.body import WholeBody
from service.http.door.connection import FIRST_CHECK_S, limited_protocol
from service.http.door.connection_limit import OpenConnections, descriptor_budget
from service.http.door.guard import Guard
from service.http.door.observe import Observe
from service.http.door.request_line import OriginForm
from service.http.door.security_headers import SECURITY_HEADERS
from service.metrics import OUTCOMES, Metrics
from tests.waiting import POLL_S, runs, scaled

HOUR = 3600.0
SHORT_S = scaled(0.2)
"""A limit that a request sent at once meets."""
LONG_ANSWER = 64 << 20
"""Bytes: more than the socket buffers of any kernel."""
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n"
SLOW = b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class App:
    """Answers `long` with a long body and other paths with a short one, after reading the request; records requests."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ended = asyncio.Event()
        self.let = asyncio.Event()
        """Ends the wait of `slow`, which answers 499 to disconnected clients."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.seen.append(scope["path"])
        if scope["path"] == "/slow" and await self._client_leaves(receive):
            self.seen.append("gone")
            return
        body = bytes(LONG_ANSWER) if scope["path"] == "/long" else b"ok"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in (body, b""):
            await send({"type": "http.response.body", "body": part, "more_body": bool(part)})
        self.ended.set()

    async def _client_leaves(self, receive: Receive) -> bool:
        """Wait until the client has disconnected (True), or until the answer is released."""
        gone, let = asyncio.ensure_future(disconnected(receive)), asyncio.ensure_future(self.let.wait())
        done, waiting = await asyncio.wait((gone, let), return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        return gone in done


Connect = Callable[[], Coroutine[object, object, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@asynccontextmanager
async def serving(
    app: App,
    read_seconds: float = HOUR,
    write_seconds: float = HOUR,
    metrics: Metrics | None = None,
    connections: int = 100,
) -> AsyncIterator[Connect]:
    observed = Observe(Guard(WholeBody(app, max_bytes=100), allowed_hosts=["x"]), metrics or Metrics())
    protocol = limited_protocol(read_seconds, write_seconds, OpenConnections(connections))
    config = uvicorn.Config(OriginForm(observed), http=protocol, lifespan="off", log_config=None)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))  # noqa: SLF001  # serve() would take the test's signals
    while not server.started:
        await asyncio.sleep(POLL_S)
    try:
        yield lambda: asyncio.open_connection(*listener.getsockname(), limit=4 << 20)
    finally:
        server.should_exit = server.force_exit = True
        await task
        listener.close()


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", POST + b"1234"])
def test_a_request_that_does_not_arrive_is_ended(sent: bytes) -> None:
    @runs
    async def check() -> None:
        app = App()
        async with serving(app, read_seconds=SHORT_S) as connect:
            reader, writer = await connect()
            writer.write(sent)
            answer = await reader.read()  # read to the end: the connection is closed
            writer.close()
        assert app.seen == []
        assert bool(answer) == bool(sent)  # no answer without a request
        if sent:
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nConnection: close" in head
            assert all(f"\r\n{name}: {value}".encode() in head for name, value in SECURITY_HEADERS.items())
            assert json.loads(body)["detail"] == f"the request did not arrive within {SHORT_S:g} s"

    check()


@runs
async def test_a_request_without_its_body_is_logged_and_counted_with_its_answer() -> None:
    metrics = Metrics()
    async with serving(App(), read_seconds=SHORT_S, metrics=metrics) as connect:
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
async def test_an_incomplete_request_after_an_answer_does_not_get_the_former_request_id() -> None:
    async with serving(App(), read_seconds=SHORT_S) as connect:
        reader, writer = await connect()
        writer.write(POST.replace(b"Host", b"X-Request-ID: mine\r\nHost") + b"12345" + POST[:10])
        first, second = (await reader.read()).split(b"HTTP/1.1 408 ")
        writer.close()
    assert b"mine" in first
    assert b"X-Request-ID" not in second


@runs
async def test_single_bytes_do_not_extend_the_limit() -> None:
    app = App()
    async with serving(app, read_seconds=SHORT_S) as connect:
        reader, writer = await connect()
        ended = asyncio.ensure_future(reader.read())
        while not ended.done():
            writer.write(b"G")
            await asyncio.sleep(POLL_S)
        with suppress(ConnectionError):  # a client that still writes when the connection closes may miss the answer
            assert ended.result().startswith(b"HTTP/1.1 408 ")
        writer.close()
    assert app.seen == []


@runs
async def test_the_second_request_of_a_connection_has_a_limit_too() -> None:
    app = App()
    async with serving(app, read_seconds=SHORT_S) as connect:
        for second in (POST[:10], POST + b"12"):
            reader, writer = await connect()
            writer.write(POST + b"12345" + second)  # its first part arrives before the first request is answered
            answers = await reader.read()
            assert answers.startswith(b"HTTP/1.1 200 ")
            assert b"HTTP/1.1 408 " in answers
            writer.close()
    assert app.seen == ["/", "/"]


@runs
async def test_a_connection_between_two_requests_is_not_a_slow_one() -> None:
    async with serving(App(), read_seconds=SHORT_S) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(POST + b"12345")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(2 * SHORT_S)
        assert not reader.at_eof()
        writer.close()


@runs
async def test_the_connection_of_a_client_that_does_not_read_is_closed() -> None:
    app = App()
    async with serving(app, write_seconds=SHORT_S) as connect:
        reader, writer = await connect()
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.ended.wait()  # the wait for the client's reading ends
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(LONG_ANSWER)
        writer.close()


@runs
async def test_a_client_that_reads_slowly_gets_its_answer() -> None:
    app = App()
    async with serving(app, write_seconds=scaled(1)) as connect:
        reader, writer = await connect()
        writer.write(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        got = 0
        while got < LONG_ANSWER:
            got += len(await reader.read(8 << 20))
            await asyncio.sleep(POLL_S)
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
def test_invalid_requests_are_answered_with_a_problem_and_closed(sent: bytes) -> None:
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
async def test_an_invalid_body_after_its_answer_closes_the_connection() -> None:
    async with serving(App()) as connect:
        reader, writer = await connect()
        writer.write(
            POST.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"80\r\n" + b"a" * 128 + b"\r\n"
        )
        assert b"HTTP/1.1 413 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"garbage\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()


@pytest.mark.parametrize("requests", [1, 2])
def test_a_client_that_has_closed_its_sending_side_gets_its_answers(requests: int) -> None:
    @runs
    async def check() -> None:
        app = App()
        async with serving(app) as connect:
            reader, writer = await connect()
            writer.write((POST + b"12345") * requests)
            writer.write_eof()
            answers = await reader.read()
            writer.close()
        assert app.seen == ["/"] * requests
        assert answers.count(b"HTTP/1.1 200 ") == requests

    check()


@runs
async def test_a_half_closed_client_gets_a_late_answer_and_is_probed() -> None:
    app = App()
    async with serving(app) as connect:
        reader, writer = await connect()
        writer.write(SLOW)
        writer.write_eof()
        assert await reader.readexactly(len(CONTINUE)) == CONTINUE
        await asyncio.sleep(5 * FIRST_CHECK_S)  # enough for several checks
        app.let.set()
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert app.seen == ["/slow"]


@pytest.mark.parametrize(("sent", "leaves"), [(SLOW, "closes"), (SLOW.replace(b"1.1", b"1.0"), "half-closes")])
def test_the_request_of_a_disconnected_client_ends(sent: bytes, leaves: str) -> None:
    @runs
    async def check() -> None:
        app = App()
        async with serving(app) as connect:
            reader, writer = await connect()
            writer.write(sent)
            if leaves == "closes":
                while not app.seen:
                    await asyncio.sleep(POLL_S)
                writer.close()
            else:  # HTTP/1.0 cannot be asked
                writer.write_eof()
                assert await reader.read() == b""
                writer.close()
            while app.seen != ["/slow", "gone"]:
                await asyncio.sleep(POLL_S)

    check()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHo", POST + b"123", POST + b"12345" + POST])
def test_an_incomplete_request_of_a_half_closed_client_is_answered_at_once(sent: bytes) -> None:
    @runs
    async def check() -> None:
        async with serving(App()) as connect:
            reader, writer = await connect()
            writer.write(sent)
            writer.write_eof()
            _, _, answer = (await reader.read()).rpartition(b"HTTP/1.1 ")
            writer.close()
        assert answer.startswith(b"400 ")
        _, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["detail"] == "the connection was closed before the whole request had arrived"

    check()


@runs
async def test_a_client_that_closes_without_a_request_gets_no_answer() -> None:
    async with serving(App()) as connect:
        for sent in (b"", POST + b"12345"):
            reader, writer = await connect()
            writer.write(sent)
            if sent:
                await reader.readuntil(b"ok")
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()


def test_an_upgrade_to_http_2_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"

    @runs
    async def check() -> None:
        async with serving(App()) as connect:
            reader, writer = await connect()
            for _ in range(2):
                writer.write(POST.replace(b"Host", upgrade + b"Host") + b"12345")
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            writer.close()

    check()
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


@pytest.mark.parametrize(
    ("target", "host", "status", "path"),
    [
        (b"http://x/v1/models?a=%20b", b"elsewhere", 200, "/v1/models"),
        (b"HTTP://x:8000/a%20b", b"elsewhere", 200, "/a b"),
        (b"http://x", b"x", 200, "/"),
        (b"https://x?a", b"x", 200, "/"),
        (b"http://elsewhere/", b"x", 421, None),
        (b"/http://elsewhere/", b"x", 200, "/http://elsewhere/"),
    ],
)
def test_a_target_with_scheme_and_host_sets_path_and_host(
    target: bytes, host: bytes, status: int, path: str | None
) -> None:
    @runs
    async def check() -> None:
        app = App()
        async with serving(app) as connect:
            reader, writer = await connect()
            writer.write(b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert app.seen == ([] if path is None else [path])

    check()


@runs
async def test_a_new_connection_replaces_the_longest_idle_one() -> None:
    app = App()
    async with serving(app, connections=2) as connect:
        reader, writer = await connect()
        other_reader, other = await connect()
        other.write(b"G")  # does not make it busy
        writer.write(POST + b"12345")
        await reader.readuntil(b"ok")  # idle again, for a shorter time than the other
        for _ in range(2):
            third_reader, third = await connect()
            third.write(POST + b"12345")
            assert b"HTTP/1.1 200 " in await third_reader.readuntil(b"ok")
            with suppress(ConnectionError):
                assert await other_reader.read() == b""
            other.close()
            other_reader, other, reader, writer = reader, writer, third_reader, third
        other.close()
        writer.close()


@runs
async def test_health_is_answered_while_all_connections_are_busy() -> None:
    app = App()
    async with serving(app, connections=2) as connect:
        busy = [await connect() for _ in range(2)]
        for _, writer in busy:
            writer.write(SLOW)
        while len(app.seen) < 2:
            await asyncio.sleep(POLL_S)
        for path, status in ((b"/healthz", b"200"), (b"/v1/models", b"503"), (b"/metrics", b"200")):
            reader, writer = await connect()
            writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status)
            if status == b"503":
                assert b"\r\nRetry-After: 1\r\n" in head.replace(b"retry-after", b"Retry-After")
                assert json.loads(await reader.read())["error"]["code"] == "too_many_connections"
            writer.close()
        app.let.set()
        for reader, writer in busy:
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            writer.close()
        while True:  # when they have closed, there is room again
            reader, writer = await connect()
            writer.write(POST + b"12345")
            status_line = await reader.readline()
            writer.close()
            if status_line.startswith(b"HTTP/1.1 200 "):
                break


@pytest.mark.parametrize(("limit", "spare"), [(40, 10), (1024, 64), (1 << 20, 64)])
def test_connections_leave_descriptors_for_other_uses(limit: int, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr("service.http.door.connection_limit._open_descriptors", lambda: 15)
    budget = descriptor_budget()
    assert budget.connections == limit - 15 - spare
    assert budget.accepts == spare // 4  # accepted in three turns of the event loop before the first are closed
    monkeypatch.setattr("service.http.door.connection_limit._open_descriptors", lambda: limit)
    assert descriptor_budget().connections == 1
