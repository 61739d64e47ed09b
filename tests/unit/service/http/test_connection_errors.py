"""Answers of a connection without the app have the form of the called interface."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.http.interfaces import Interface
from tests.unit.service.http.test_connection import App, serving
from tests.waiting import runs

DAMAGED = "Transfer-Encoding: chunked\r\n\r\n"
SLOW = "Content-Length: 5\r\n\r\n"


@pytest.mark.parametrize(("sent", "status"), [(SLOW, 408), (DAMAGED, 400)], ids=["slow", "damaged"])
@pytest.mark.parametrize(
    ("path", "interface"),
    [
        ("/v1/images/generations", Interface.OPENAI),
        ("/v2/models/m/infer", Interface.KSERVE),
        ("/", Interface.NATIVE_AND_OPENAI),  # no app here that would know the interface
    ],
)
def test_the_error_for_a_missing_body_has_the_callers_form(
    path: str, interface: Interface, sent: str, status: int
) -> None:
    @runs
    async def check() -> None:
        async with serving(App(), read_seconds=0.5 if status == 408 else 60) as connect:
            reader, writer = await connect()
            writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\n{sent}".encode())
            await writer.drain()
            if status == 400:
                writer.write(b"no size\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        content: dict[str, Any] = json.loads(body)
        assert f"\r\nContent-Length: {len(body)}\r\n".encode() in head
        problem = {"type", "title", "status", "detail"}
        match interface:
            case Interface.OPENAI:
                assert set(content["error"]) == {"message", "type", "param", "code"}
                assert f"\r\nX-Should-Retry: {'true' if status == 408 else 'false'}\r\n".encode() in head
            case Interface.KSERVE:
                assert isinstance(content["error"], str)
            case _:
                assert set(content) == problem | {"error"}
                assert content["status"] == status

    check()
