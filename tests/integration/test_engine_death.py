"""An engine that stops with an error: everybody is told, and the health routes turn red."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import httpx
from torch import Tensor

from service.api.app import assemble
from service.backends.torch_backend import TorchBackend
from service.settings import Settings
from tests.fakes import tiny_checkpoint


class Mortal(TorchBackend):
    """A backend that fails once it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.doomed = threading.Event()

    def __call__(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None) -> Tensor:
        if self.doomed.is_set():
            raise RuntimeError("secret detail of the device")
        return super().__call__(x_t, emb_t, y)


def test_an_error_in_the_engine_reaches_every_waiting_request_and_turns_health_red(tmp_path: Path) -> None:
    backend = Mortal(tiny_checkpoint(tmp_path / "tiny"))
    app = assemble(Settings(models=(tmp_path / "tiny",)), {"tiny": backend})

    async def check() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as client,
        ):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)

            body = {"steps": 1000, "n": 4}
            waiting = [asyncio.create_task(client.post("/v1/generate", json=body)) for _ in range(4)]
            while "iddpm_images_running 0.0" in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)
            backend.doomed.set()
            answers = await asyncio.gather(*waiting)

            assert [answer.status_code for answer in answers] == [500] * 4
            assert {answer.json()["title"] for answer in answers} == {"Engine stopped"}
            assert all("secret" not in answer.text for answer in answers)
            assert [(await client.get(path)).status_code for path in ("/readyz", "/healthz")] == [503, 503]
            late = await client.post("/v1/generate", json={"steps": 2})
            assert (late.status_code, "retry-after" in late.headers) == (503, True)
            counted = (await client.get("/metrics")).text
            assert 'iddpm_requests_total{outcome="failed"} 4.0' in counted
            assert "iddpm_ready 0.0" in counted

    asyncio.run(asyncio.wait_for(check(), timeout=300))
