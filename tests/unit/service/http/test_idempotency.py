"""One execution and equal answers for a client's key; the memory is bounded, and keys of clients are separate."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from service.http.door.body import WholeBody
from service.http.door.client import Client
from service.http.door.context import context_of
from service.http.door.idempotency import OVERHEAD_BYTES, Idempotency, derived_seed
from tests.waiting import eventually, runs


class App:
    """Answers with the number of its executions once it is allowed to; records cancellation."""

    def __init__(self, status: int = 200, size: int = 0) -> None:
        self.status = status
        self.size = size
        self.runs = 0
        self.ended_early = 0
        self.let = asyncio.Event()
        self.let.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.runs += 1
        answer = JSONResponse({"run": self.runs, "padding": "x" * self.size}, self.status)
        assert (await receive())["type"] == "http.request"
        gone, let = asyncio.ensure_future(receive()), asyncio.ensure_future(self.let.wait())
        await asyncio.wait([gone, let], return_when=asyncio.FIRST_COMPLETED)
        if not let.done():
            self.ended_early += 1
            answer = JSONResponse({}, 499)
        for future in (gone, let):
            future.cancel()
        await answer(scope, receive, send)


class Door:
    """Clients of the middleware, named as `Identify` does."""

    def __init__(self, app: App, max_bytes: int = 1 << 20) -> None:
        self.now = 0.0
        self.idempotency = Idempotency(app, max_bytes, keep_s=60, clock=lambda: self.now)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context_of(scope).client = Client(scope["client"][0])
        await WholeBody(self.idempotency, max_bytes=100)(scope, receive, send)

    async def post(
        self, key: str | None, body: str = "{}", client: str = "alice", accept: str = "*/*"
    ) -> httpx.Response:
        headers = [(b"Accept", accept.encode())]
        if key is not None:
            headers.append((b"Idempotency-Key", key.encode("latin-1")))
        transport = httpx.ASGITransport(self, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post("/", content=body, headers=headers)

    def begin(self, key: str) -> tuple[asyncio.Task[None], asyncio.Event]:
        """Begin a request; its client disconnects when the event is set."""
        gone, given = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": b"{}", "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(b"idempotency-key", key.encode())],
            "client": ("alice", 1),
        }
        return asyncio.create_task(self(scope, receive, send)), gone


@runs
async def test_fifty_concurrent_requests_with_a_key_are_one_execution_and_get_equal_answers() -> None:
    app = App()
    app.let.clear()
    door = Door(app)
    asked = [asyncio.create_task(door.post("k")) for _ in range(50)]
    await eventually(lambda: app.runs == 1)
    app.let.set()
    answers = await asyncio.gather(*asked)
    later = await door.post("k")
    assert {answer.content for answer in [*answers, later]} == {answers[0].content}
    assert app.runs == 1
    replayed = ["idempotent-replayed" in answer.headers for answer in [*answers, later]]
    assert replayed.count(False) == 1
    assert later.headers["content-type"] == "application/json"


@runs
async def test_without_a_key_every_request_is_executed() -> None:
    app = App()
    door = Door(app)
    assert [(await door.post(None)).json()["run"] for _ in range(2)] == [1, 2]


@runs
async def test_another_body_accept_or_path_with_the_same_key_is_refused() -> None:
    app = App()
    door = Door(app)
    assert (await door.post("k")).status_code == 200
    for other in (door.post("k", body="{ }"), door.post("k", accept="image/png")):
        refused = await other
        assert (refused.status_code, refused.json()["title"]) == (422, "Idempotency key reused")
    app.let.clear()
    running, _ = door.begin("k2")
    await eventually(lambda: app.runs == 2)
    assert (await door.post("k2", body="{ }")).status_code == 422
    app.let.set()
    await running
    assert app.runs == 2


@runs
async def test_keys_of_two_clients_are_separate() -> None:
    app = App()
    door = Door(app)
    assert [(await door.post("k", client=client)).json()["run"] for client in ("alice", "bob", "alice")] == [1, 2, 1]


@pytest.mark.parametrize("status", [422, 429, 500, 503])
def test_error_answers_are_not_kept(status: int) -> None:
    @runs
    async def check() -> None:
        app = App(status)
        door = Door(app)
        assert [(await door.post("k")).json()["run"] for _ in range(2)] == [1, 2]

    check()


@runs
async def test_an_execution_is_cancelled_only_when_all_its_clients_have_left() -> None:
    app = App()
    app.let.clear()
    door = Door(app)
    (first, first_gone), (second, second_gone) = door.begin("k"), door.begin("k")
    await eventually(lambda: app.runs == 1)
    first_gone.set()
    for _ in range(100):
        await asyncio.sleep(0)
    assert app.ended_early == 0
    second_gone.set()
    await asyncio.gather(first, second)
    again = asyncio.create_task(door.post("k"))
    await eventually(lambda: app.runs == 2)
    app.let.set()
    assert (await again).json()["run"] == 2
    assert app.ended_early == 1
    assert (await door.post("k")).json()["run"] == 2  # an answer that ended early is not kept


@runs
async def test_the_body_of_a_client_that_has_left_counts_until_its_execution_ends() -> None:
    may_end = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await may_end.wait()
        await JSONResponse({})(scope, receive, send)

    door = Door(App())
    door.idempotency = Idempotency(slow, 1000, keep_s=60)
    (first, first_gone), (second, second_gone) = door.begin("k"), door.begin("k")
    for gone in (second_gone, first_gone):
        gone.set()
        for _ in range(100):
            await asyncio.sleep(0)
    assert (first.done(), second.done()) == (False, True)
    may_end.set()
    await first


@runs
async def test_an_error_of_the_app_reaches_all_waiting_clients_and_is_not_kept() -> None:
    app = App()

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await app.let.wait()
        app.runs += 1
        raise ValueError("broken")

    app.let.clear()
    door = Door(app)
    door.idempotency = Idempotency(fail, 1000, keep_s=60)
    asked = [asyncio.create_task(door.post("k")) for _ in range(3)]
    for _ in range(1000):  # turns of the event loop, in which all three start to wait
        await asyncio.sleep(0)
    app.let.set()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    with pytest.raises(ValueError, match="broken"):
        await door.post("k")
    assert app.runs == 2


@runs
async def test_answers_expire_by_age_and_the_oldest_are_removed_beyond_the_limit_of_bytes() -> None:
    app = App(size=10_000)
    door = Door(app, max_bytes=3 * (10_100 + OVERHEAD_BYTES))
    assert [(await door.post(key)).json()["run"] for key in "abcd"] == [1, 2, 3, 4]
    assert [(await door.post(key)).json()["run"] for key in "dcb"] == [4, 3, 2]
    door.now = 59.9
    assert (await door.post("a")).json()["run"] == 5  # it was the oldest; now b is
    door.now = 60.1
    assert [(await door.post(key)).json()["run"] for key in "ad"] == [5, 6]
    app.size = 100_000
    assert [(await door.post("long")).json()["run"] for _ in range(2)] == [7, 8]  # larger than the cache
    assert [(await door.post(key)).json()["run"] for key in "ad"] == [5, 6]  # and removes nothing


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "\xe4", "\x01"])
def test_an_invalid_key_is_refused(key: str) -> None:
    @runs
    async def check() -> None:
        door = Door(app := App())
        refused = await door.post(key)
        assert (refused.status_code, app.runs) == (400, 0)

    check()


def test_a_derived_seed_depends_on_client_and_key_only() -> None:
    assert derived_seed("alice", "k") == derived_seed("alice", "k")
    seeds = {derived_seed(client, key) for client in ("alice", "bob", "alic") for key in ("k", "l", "ek")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert derived_seed("alice", "k") == 5454976023624564  # must never change: images would change
