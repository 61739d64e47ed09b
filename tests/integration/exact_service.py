"""A complete service around an exact network, on a real port of this process, and the pixels that it must return."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import uvicorn
from fastapi import FastAPI

from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.http.app import assemble
from service.settings import Settings
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import tiny_config
from tests.waiting import PATIENCE_S, until

MODEL = "tiny"


def exact_app(denoiser: ExactDenoiser | None = None, name: str = MODEL, **settings: Any) -> FastAPI:
    """Assemble a service with one model."""
    served = denoiser or ExactDenoiser(tiny_config())
    return assemble(Settings(models=(Path(name),), max_rows=8, **settings), {name: served})


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app from a thread until the block ends; yield host and port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            _wait_ready(address)
            yield address
        finally:
            server.should_exit = True
            thread.join()


def _wait_ready(address: str) -> None:
    def ready() -> bool:
        with suppress(httpx.TransportError):
            httpx.get(f"http://{address}/healthz", timeout=PATIENCE_S).raise_for_status()
            return httpx.get(f"http://{address}/readyz", timeout=PATIENCE_S).status_code == 200
        return False

    until(ready)


@cache
def _alone(
    seed: int, image_index: int, class_index: int, steps: int, cfg_scale: float, sampler: str, eta: float
) -> npt.NDArray[np.uint8]:
    denoiser = ExactDenoiser(tiny_config())
    plan = build_plan(denoiser.config.diffusion, sampler, str(steps), eta)
    spec = ImageSpec(seed=seed, image_index=image_index, class_index=class_index, cfg_scale=cfg_scale)
    return sample_images(AsNetwork(denoiser), plan, [spec], xp=np)[0]


def expected(
    seed: int,
    image_index: int,
    class_index: int,
    *,
    steps: int,
    cfg_scale: float = 1.5,
    sampler: str = "ancestral",
    eta: float = 0.0,
) -> npt.NDArray[np.uint8]:
    """Sample one image [H, W, C] alone and without a service, with the guidance that the model recommends."""
    return _alone(seed, image_index, class_index, steps, cfg_scale, sampler, eta)
