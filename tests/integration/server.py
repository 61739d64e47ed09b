"""A real server process for tests: `iddpm serve` on a free port, with helpers to call it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import PATIENCE_S, START_POLL_S, until


class Server:
    """A running service."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def generate(self, **body: Any) -> httpx.Response:
        """POST /v1/generate."""
        return httpx.post(f"{self.url}/v1/generate", json=body, timeout=PATIENCE_S)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S)

    def metrics(self) -> dict[str, float]:
        return scrape(self.url)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)


def scrape(url: str) -> dict[str, float]:
    """Scrape /metrics: samples by name, with label values appended."""
    samples = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text):
        for sample in family.samples:
            samples[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return samples


@contextmanager
def running(
    model: Path, log: Path, *flags: str, iddpm: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start `iddpm serve` (ours, or another installation's) and wait until it is ready; kill it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = iddpm or Path(sys.executable).with_name("iddpm")
    command = [str(program), "serve", "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "IDDPM_DRAIN_NOTICE_S": "0", **(environment or {})},
        )
    server = Server(process, port, log)
    try:
        _wait_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_ready(server: Server) -> None:
    def ready_or_gone() -> bool:
        if server.process.poll() is not None:
            return True
        with suppress(httpx.TransportError):
            return server.get("/readyz").status_code == 200
        return False

    with suppress(TimeoutError):
        until(ready_or_gone, START_POLL_S)
        if server.process.poll() is None:
            return
    raise RuntimeError(f"the server did not become ready:\n{server.log.read_text()}")
