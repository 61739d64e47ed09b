"""An engine that stops with an error: every waiting request gets an error, and the health routes fail."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
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
from tests.fakes import tiny_checkpoint, tiny_config
from tests.integration.collector import collecting
from tests.waiting import PATIENCE_S, eventually, run_async, until


class Mortal(TorchBackend):
    """A backend that fails once a file exists."""

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
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=PATIENCE_S) as client,
        ):

            async def is_ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            async def all_are_accepted() -> bool:
                return "iddpm_predicted_wait_seconds_count 4.0" in (await client.get("/metrics")).text

            await eventually(is_ready)

            body = {"steps": 1000, "n": 4}
            waiting = [asyncio.create_task(client.post("/v1/generate", json=body)) for _ in range(4)]
            await eventually(all_are_accepted)
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

    run_async(check())


DOOMED = """
import sys, time
from pathlib import Path
from diffusion.config import CheckpointConfig
from service.http import tracing
from service.http.app import assemble
from service.logs import configure_logging
from service.http.server import serve
from service.http.tracing import tracing_to_collector
from service.engine import watchdog
from service.settings import Settings
from tests.denoisers import ExactDenoiser

fate, folder, port, config = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
watchdog.HANG_FLOOR_S = float("inf")  # until it hangs on purpose
tracing.CLOSE_SECONDS = 1000.0

class Doomed(ExactDenoiser):
    def __call__(self, inputs):
        if (folder / "held").exists():
            while not (folder / "doomed").exists():
                time.sleep(0.01)
            if fate == "raises":
                raise RuntimeError("the device is gone")
            watchdog.HANG_FLOOR_S = 0.5
            while True:
                time.sleep(1000)
        return super().__call__(inputs)

configure_logging()
settings = Settings(models=(Path("doomed"),), port=port)
doomed = Doomed(CheckpointConfig.model_validate_json(config))
app = assemble(settings, {"doomed": doomed}, tracing=tracing_to_collector())
sys.exit(0 if serve(app, settings) else 1)
"""


@pytest.mark.parametrize(("fate", "said"), [("raises", "stopped with an error (RuntimeError)"), ("hangs", "hangs")])
def test_the_process_ends_with_an_error_after_it_has_answered_all_requests(
    tmp_path: Path, fate: str, said: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    with collecting() as collector, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DOOMED, fate, str(tmp_path), str(port), tiny_config().model_dump_json()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return _status(f"{url}/readyz") == 200

        try:
            until(is_ready)
            with httpx.Client(timeout=PATIENCE_S) as client, ThreadPoolExecutor(4) as pool:
                (tmp_path / "held").touch()
                waiting = [pool.submit(client.post, f"{url}/v1/generate", json={"steps": 9}) for _ in range(4)]
                until(lambda: "iddpm_predicted_wait_seconds_count 4.0" in client.get(f"{url}/metrics").text)
                (tmp_path / "doomed").touch()
                answers = [future.result() for future in waiting]
            assert _status(f"{url}/healthz") in (503, None)  # None: the process has ended already
            assert process.wait(PATIENCE_S) == 1
        finally:
            process.kill()
            process.wait()
    assert [answer.status_code for answer in answers] == [500] * 4
    assert all(said in answer.json()["detail"] for answer in answers)
    spans = [span for span in collector.spans if span.name == "POST /v1/generate"]  # just before the process ends
    assert len(spans) == len(answers)
    assert all(span.status.code == Status.STATUS_CODE_ERROR for span in spans)


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=PATIENCE_S).status_code
    except httpx.TransportError:
        return None
