"""The metrics and log line of an answer that breaks off after it has begun."""

from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.http.door.observe import Observe
from service.metrics import Metrics


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [(RuntimeError("no"), 500, "failed"), (asyncio.CancelledError(), 499, "cancelled")],
    ids=["raises", "cancelled"],
)
def test_an_answer_that_breaks_off_is_not_counted_as_ok(
    caplog: pytest.LogCaptureFixture, error: BaseException, status: int, outcome: str
) -> None:
    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        pass

    metrics = Metrics()
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": []}
    with caplog.at_level(logging.INFO), pytest.raises(type(error)):
        asyncio.run(Observe(breaks_off, metrics)(scope, receive, send))
    assert f"POST /v1/generate {status}" in caplog.text
    counted = {o: metrics.registry.get_sample_value("iddpm_requests_total", {"outcome": o}) for o in ("ok", outcome)}
    assert counted == {"ok": 0, outcome: 1}
