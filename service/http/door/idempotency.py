"""Idempotency-Key: all requests of a client with the same key get one execution and equal answers.

A pure ASGI middleware, so it applies to every route. The execution is a task of its own; it ends early only when all
clients that wait for it have disconnected. Answers with a status below 300 are kept for a limited time. Any other
answer is discarded after it was sent, so that a retry executes the request again. If no answer is kept (another
replica, a restart, the memory limit), the request is executed again with the seed of `derived_seed`, which gives the
same images.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.noise import MAX_SEED
from service.http.door.context import client_of_request, context_of
from service.http.interfaces import takes_form
from service.http.kserve.tensors import LENGTH_HEADER
from service.http.multipart import boundary_of
from service.http.problems import problem

HEADER = "Idempotency-Key"
KEY = re.compile(r"[!-~]{1,255}")
REPLAYED = (b"idempotent-replayed", b"true")
OVERHEAD_BYTES = 2048
"""Memory of a kept answer beside its body: key, headers, objects."""

Name = tuple[str, str]
"""Client name and Idempotency-Key, so that equal keys of two clients are independent."""


def derived_seed(client: str, key: str) -> int:
    """Return the seed of a request with a key and without a seed; it is the same on every replica."""
    return int.from_bytes(sha256(f"{client}\n{key}".encode()).digest()) % (MAX_SEED + 1)


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    async def send(self, send: Send, *more: tuple[bytes, bytes]) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": [*self.headers, *more]})
        await send({"type": "http.response.body", "body": self.body})


@dataclass
class _Execution:
    digest: bytes
    """Hash of the request."""
    waiting: int = 0
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[_Answer] = field(init=False)


@dataclass(frozen=True)
class _Kept:
    digest: bytes
    answer: _Answer
    until: float

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.answer.body) + OVERHEAD_BYTES


class Idempotency:
    """Executes requests with a key once; the answers that it keeps are bounded in bytes and age."""

    def __init__(
        self, app: ASGIApp, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        self._clock = clock
        self._running: dict[Name, _Execution] = {}
        self._kept: OrderedDict[Name, _Kept] = OrderedDict()  # oldest first
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, whose body has been read."""
        key = Headers(scope=scope).get(HEADER) if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None:
            await self._app(scope, receive, send)
        elif not KEY.fullmatch(key):
            await _refused(400, "Bad request", "must be 1 to 255 printable ASCII characters")(scope, receive, send)
        else:
            context_of(scope).idempotency_key = key
            await self._once(scope, receive, send, key)

    async def _once(self, scope: Scope, receive: Receive, send: Send, key: str) -> None:
        name, request = (client_of_request(scope).name, key), await receive()
        digest = _hash_of(scope, request["body"])
        self._forget_old()
        known = self._running.get(name) or self._kept.get(name)
        if known is not None and known.digest != digest:
            detail = "was used for another request; a key belongs to one path, Accept header and body"
            await _refused(422, "Idempotency key reused", detail)(scope, receive, send)
        elif isinstance(known, _Kept):
            await known.answer.send(send, REPLAYED)
        else:
            execution = known or self._execute(name, digest, scope, request)
            answer = await self._wait(execution, name, receive)
            if answer is not None:
                await answer.send(send, *([REPLAYED] if known else []))
            elif known is None:  # the execution holds this request's body, whose memory counts until this call returns
                await asyncio.wait([execution.task])

    def _execute(self, name: Name, digest: bytes, scope: Scope, request: Message) -> _Execution:
        execution = self._running[name] = _Execution(digest)
        execution.task = asyncio.create_task(self._run(scope, request, execution))
        execution.task.add_done_callback(lambda _: self._end(name, execution))
        return execution

    async def _run(self, scope: Scope, request: Message, execution: _Execution) -> _Answer:
        messages = [request]
        sent: list[Message] = []

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await execution.abandoned.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        start, *parts = sent
        return _Answer(start["status"], list(start["headers"]), b"".join(part.get("body", b"") for part in parts))

    async def _wait(self, execution: _Execution, name: Name, receive: Receive) -> _Answer | None:
        """Wait for an execution's answer; None: the client disconnected. The last client to disconnect ends it."""
        execution.waiting += 1
        gone = asyncio.ensure_future(receive())  # the body has been read, so only a disconnect can follow
        try:
            await asyncio.wait([execution.task, gone], return_when=asyncio.FIRST_COMPLETED)
            return execution.task.result() if execution.task.done() else None
        finally:
            gone.cancel()
            execution.waiting -= 1
            if not execution.waiting and not execution.task.done():
                execution.abandoned.set()
                self._running.pop(name)  # a later request executes again

    def _end(self, name: Name, execution: _Execution) -> None:
        if self._running.get(name) is execution:
            del self._running[name]
        if execution.task.cancelled() or execution.task.exception() or execution.abandoned.is_set():
            return
        answer = execution.task.result()
        kept = _Kept(execution.digest, answer, self._clock() + self._keep_s)
        # An answer above the limit by itself would displace all the others
        if answer.status < 300 and kept.size <= self._max_bytes:
            self._kept[name] = kept
            self._bytes += kept.size
            self._forget_old()

    def _forget_old(self) -> None:
        now = self._clock()
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if oldest.until > now and self._bytes <= self._max_bytes:
                break
            del self._kept[name]
            self._bytes -= oldest.size


def _hash_of(scope: Scope, body: bytes) -> bytes:
    """Hash the parts of a request that determine its answer."""
    headers = Headers(scope=scope)
    boundary = boundary_of(headers.get("content-type", "")) if takes_form(scope["path"]) else b""
    if boundary:  # clients draw it anew for every attempt
        body = (b"\r\n" + body).replace(b"\r\n--" + boundary, b"\r\n--")
    named = (", ".join(headers.getlist(name)).encode() for name in ("accept", LENGTH_HEADER))
    parts = (scope["path"].encode(), scope["query_string"], *named, body)
    return sha256(b"".join(len(part).to_bytes(8) + part for part in parts)).digest()


def _refused(status: int, title: str, rule: str) -> Response:
    return problem(status, title, f"{HEADER}: {rule}")
