"""A complete service around an exact network, in a separate process; a network call takes as long as a test requires.

Run: python -m tests.integration.exact_process HOST PORT SECONDS
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig
from service.http.app import assemble
from service.http.server import serve
from service.logs import configure_logging
from service.settings import Settings
from tests.denoisers import ExactDenoiser
from tests.paths import ROOT
from tests.waiting import PATIENCE_S, START_POLL_S, until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(output: Any, host: str, port: int, seconds: float, **options: Any) -> subprocess.Popen[bytes]:
    """Start a service whose network calls take this number of seconds."""
    command = [sys.executable, "-m", __name__, host, str(port), str(seconds)]
    return subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, **options)


@contextmanager
def serving(output: Any, host: str = "127.0.0.1", seconds: float = 0, **options: Any) -> Iterator[tuple[Any, str]]:
    """Run a service on a free port; yield the process and its URL."""
    port = free_port()
    process = start(output, host, port, seconds, **options)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def status_of(url: str) -> int | None:
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=PATIENCE_S).status_code
    return None


def wait_for(process: subprocess.Popen[bytes], url: str, status: int) -> None:
    def answers() -> bool:
        assert process.poll() is None
        return status_of(url) == status

    until(answers, START_POLL_S)


def main() -> None:
    host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

    class Slow(ExactDenoiser):
        def __call__(self, inputs: Any) -> Any:
            time.sleep(seconds)
            return super().__call__(inputs)

    configure_logging()
    settings = Settings(models=(Path("m"),), host=host, port=port, allow_keyless=True)
    model = ModelConfig(
        image_size=8, image_channels=1, model_channels=32, attention_resolutions=(8,), channel_mult=(1,)
    )
    config = CheckpointConfig(model=model, diffusion=DiffusionConfig(num_timesteps=1000))
    app = assemble(settings, {"m": Slow(config)})
    sys.exit(0 if serve(app, settings) else 1)


if __name__ == "__main__":
    main()
