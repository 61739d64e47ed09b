"""Thousands of requests to a real process: its memory stays bounded, no row leaks, and its metrics agree with its
clients.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.counts import LONG
from tests.integration.server import Server, running
from tests.paths import BUNDLED
from tests.waiting import PATIENCE_S

REQUESTS = 5000
CONCURRENCY = 20
GROWTH_MB = 30


@pytest.mark.skipif(not LONG, reason="fewer requests do not show what grows: IDDPM_TEST_LONG=1")
def test_memory_is_bounded_rows_are_freed_and_metrics_agree_with_clients(tmp_path: Path) -> None:
    draw = random.Random(0)
    bodies = [_body(draw) for _ in range(REQUESTS)]
    warm_up, rest = bodies[: REQUESTS // 10], bodies[REQUESTS // 10 :]
    with running(BUNDLED, tmp_path / "log", "--threads", "1") as server:
        counted = asyncio.run(_ask_all(server, warm_up))
        before = _resident_mb(server)
        counted += asyncio.run(_ask_all(server, rest))
        growth = _resident_mb(server) - before
        metrics = server.metrics()

    names = ("requests_total ok", "requests_total invalid", "images_total", "row_steps_total")
    assert {name: metrics[f"iddpm_{name}"] for name in names} == {name: counted[name] for name in names}
    assert counted["requests_total ok"] + counted["requests_total invalid"] == REQUESTS
    for name in ("requests_total failed", "requests_total rejected", "requests_total cancelled"):
        assert metrics[f"iddpm_{name}"] == 0
    assert metrics["iddpm_rows_per_network_call_sum"] == metrics["iddpm_row_steps_total"]
    assert metrics["iddpm_request_duration_seconds_count"] == counted["requests_total ok"]
    for name in ("images_waiting", "images_running", "images_evicted", "remaining_row_steps", "wasted_row_steps_total"):
        assert metrics[f"iddpm_{name}"] == 0
    print(f"grew by {growth:.1f} MB from {before:.1f} MB")  # noqa: T201  # shown when the test fails, or with -rP
    assert growth <= GROWTH_MB


def _body(draw: random.Random) -> dict[str, Any]:
    body = {
        "class": draw.randrange(10),
        "steps": draw.choice((2, 2, 3, 5)),
        "n": draw.choice((1, 1, 1, 2)),
        "cfg_scale": draw.choice((1, 1, 2)),
        "seed": draw.randrange(2**53),
        "format": draw.choice(("png", "webp", "npz")),
        "priority": draw.choice(("interactive", "interactive", "batch")),
    }
    return body if draw.random() > 0.02 else body | {"steps": 1}  # not allowed


async def _ask_all(server: Server, bodies: list[dict[str, Any]]) -> Counter[str]:
    """Send all requests, a number of them concurrently; return the totals expected from the answers."""
    counted: Counter[str] = Counter()
    queue = iter(bodies)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:

        async def ask() -> None:
            for body in queue:
                answer = await client.post("/v1/generate", json=body)
                if answer.status_code == 422:
                    counted["requests_total invalid"] += 1
                    continue
                assert answer.status_code == 200
                counted["requests_total ok"] += 1
                counted["images_total"] += len(answer.json()["images"])
                counted["row_steps_total"] += body["n"] * body["steps"] * body["cfg_scale"]

        await asyncio.gather(*(ask() for _ in range(CONCURRENCY)))
    return counted


def _resident_mb(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024
