"""An engine that stops with an error: everybody is told, and the health routes turn red."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi.testclient import TestClient
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
    settings = Settings(models=(tmp_path / "tiny",))
    with TestClient(assemble(settings, {"tiny": backend}), base_url="http://localhost") as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)

        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(client.post, "/v1/generate", json={"steps": 1000, "n": 4}) for _ in range(4)]
            while "iddpm_images_running 8.0" not in client.get("/metrics").text:
                time.sleep(0.01)
            backend.doomed.set()
            answers = [future.result() for future in waiting]

        assert [answer.status_code for answer in answers] == [500] * 4
        assert {answer.json()["title"] for answer in answers} == {"Engine stopped"}
        assert all("secret" not in answer.text for answer in answers)
        assert client.get("/readyz").status_code == client.get("/healthz").status_code == 503
        late = client.post("/v1/generate", json={"steps": 2})
        assert (late.status_code, "retry-after" in late.headers) == (503, True)
        counted = client.get("/metrics").text
        assert 'iddpm_requests_total{outcome="failed"} 4.0' in counted
        assert "iddpm_ready 0.0" in counted
