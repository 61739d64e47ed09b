"""Many requests of 64 images with images and masks wait in a real process: its memory stays bounded."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.counts import LONG
from tests.fakes import tiny_checkpoint
from tests.integration.server import Server, running
from tests.integration.test_given_images import npy
from tests.waiting import PATIENCE_S, eventually, run_async

pytestmark = pytest.mark.skipif(not LONG, reason="hundreds of megabytes of requests: IDDPM_TEST_LONG=1")

IMAGES, SIDE = 64, 64
LIMIT = 64 << 20
"""Bytes of given arrays, and of the bodies that they arrive in."""
MOST = 5 * LIMIT
"""What the service may grow by: arrays, bodies and the text of the bodies' files, each up to the limit, and what is
being read; 4.4 limits when it was written. Without a limit, the requests below would take 20."""
CLIENTS = 40


def body(steps: int) -> bytes:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (IMAGES, SIDE, SIDE, 3)).astype(np.float32)
    masks = (rng.random((IMAGES, SIDE, SIDE)) > 0.5).astype(np.float32)
    fields: dict[str, Any] = {"class": 1, "n": IMAGES, "steps": steps, "cfg_scale": 1, "format": "npz"}
    return json.dumps(fields | {"image": npy(images), "mask": npy(masks)}).encode()


GIVEN_BYTES = IMAGES * SIDE * SIDE * 4 * (3 + 3 + 2)
"""Of a request: images for the network and as they were sent, masks, and what they keep."""


def memory(server: Server, field: str) -> int:
    """Return VmRSS, the memory of a process, or VmHWM, its peak."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return int(dict(line.split(":", 1) for line in status.splitlines())[field].split()[0]) * 1024


def test_memory_stays_bounded_while_requests_of_64_given_images_wait(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "tiny", image_size=SIDE, image_channels=3, attention_resolutions=())
    environment = {
        "IDDPM_MAX_ROWS": "2",
        "IDDPM_MAX_QUEUE": "10000",
        "IDDPM_MAX_WAIT_S": "1e9",
        "IDDPM_CLIENT_SHARE": "1",
        "IDDPM_MAX_GIVEN_BYTES": str(LIMIT),
        "IDDPM_READ_TIMEOUT_S": "600",
    }
    with running(model, tmp_path / "log", "--threads", "1", environment=environment) as server:
        growth, refused, taken = run_async(fill(server))
    print(f"grew by {growth >> 20} MB; {taken} accepted, {dict(refused)}")  # noqa: T201  # shown with -rP
    assert taken == LIMIT // GIVEN_BYTES
    assert set(refused) == {503}
    assert growth < MOST


async def fill(server: Server) -> tuple[int, Counter[int], int]:
    """Send more requests than memory allows; return by how much the service grew, and how many it refused or took."""
    headers = {"Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=3 * CLIENTS)
    asked: list[asyncio.Task[httpx.Response]] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, headers=headers, limits=limits) as client:

        async def ask(content: bytes) -> httpx.Response:
            return await client.post("/v1/generate", content=content)

        async def metric(name: str) -> int:
            lines = (await client.get("/metrics")).text.splitlines()
            return int(float(next(line for line in lines if line.startswith(f"{name} ")).split()[1]))

        async def accepted() -> int:
            return await metric("iddpm_predicted_wait_seconds_count") - 1

        async def all_are_refused_or_wait() -> bool:
            return sum(task.done() for task in asked) + await accepted() == len(asked)

        async def nothing_waits() -> bool:
            return await metric("iddpm_images_waiting") == 0

        assert (await ask(body(2))).status_code == 200
        before, content = memory(server, "VmRSS"), body(1000)
        for _ in range(2):  # the second time nothing is free
            asked += [asyncio.create_task(ask(content)) for _ in range(CLIENTS)]
            await eventually(all_are_refused_or_wait)
        growth, taken = memory(server, "VmHWM") - before, await accepted()
        refused = Counter(task.result().status_code for task in asked if task.done())
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await eventually(nothing_waits)
        assert (await ask(body(2))).status_code == 200  # their bytes are free
    return growth, refused, taken
