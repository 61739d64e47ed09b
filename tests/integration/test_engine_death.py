"""An engine that stops with an error: everybody is told, and the health routes turn red."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from torch import Tensor

from diffusion.network_inputs import NetworkInputs
from service.backends.torch_backend import TorchBackend
from service.http.app import assemble
from service.settings import Settings
from tests.fakes import tiny_checkpoint
from tests.integration.collector import collecting


class Mortal(TorchBackend):
    """A backend that fails once it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.doomed = threading.Event()

    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        if self.doomed.is_set():
            raise RuntimeError("secret detail of the device")
        return super().__call__(inputs)


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


DOOMED = """
import sys, time
from pathlib import Path
from service.http.app import assemble
from service.logs import configure_logging
from service.http.server import serve
from service.http.tracing import tracing_to_collector
from service.engine import watchdog
from service.settings import Settings
from tests.denoisers import ExactDenoiser
from tests.fakes import tiny_config

watchdog.HANG_FLOOR_S = 0.5

class Doomed(ExactDenoiser):
    def __call__(self, inputs):
        if Path(sys.argv[2]).exists():
            if sys.argv[1] == "raises":
                raise RuntimeError("the device is gone")
            time.sleep(1000)
        return super().__call__(inputs)

configure_logging()
settings = Settings(models=(Path("doomed"),), port=int(sys.argv[3]))
app = assemble(settings, {"doomed": Doomed(tiny_config())}, tracing=tracing_to_collector())
sys.exit(0 if serve(app, settings) else 1)
"""


@pytest.mark.parametrize(("fate", "said"), [("raises", "stopped with an error (RuntimeError)"), ("hangs", "hangs")])
def test_the_process_ends_with_an_error_after_it_has_told_everybody(tmp_path: Path, fate: str, said: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, mark, log = f"http://127.0.0.1:{port}", tmp_path / "doomed", tmp_path / "log"
    with collecting() as collector, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DOOMED, fate, str(mark), str(port)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while _status(f"{url}/readyz") != 200:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            with httpx.Client(timeout=100) as client, ThreadPoolExecutor(4) as pool:
                mark.touch()
                waiting = [pool.submit(client.post, f"{url}/v1/generate", json={"steps": 9}) for _ in range(4)]
                answers = [future.result() for future in waiting]
            assert _status(f"{url}/healthz") in (503, None)  # None: it has ended already
            assert process.wait(100) == 1
        finally:
            process.kill()
            process.wait()
    assert {answer.status_code for answer in answers} <= {500, 503}  # 503 for those that came after its death
    assert said in next(answer.json()["detail"] for answer in answers if answer.status_code == 500)
    told = [span for span in collector.spans if span.name == "POST /v1/generate"]  # with its last breath
    assert len(told) == len(answers)
    assert all(span.status.code == Status.STATUS_CODE_ERROR for span in told)


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=100).status_code
    except httpx.TransportError:
        return None
