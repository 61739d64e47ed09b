"""An artifact served without torch: it gives the pixels of the one-image sampler, for images alone and in mixed
batches.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.backends.base import BackendOptions
from service.backends.select import load_denoiser
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageParams, ImageResult, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.http.app import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.counts import count
from tests.denoisers import AsNetwork
from tests.exports import Exports
from tests.fakes import generation
from tests.waiting import PATIENCE_S, POLL_S, run_async

WIDTH = 4
OPTIONS = BackendOptions(max_rows=WIDTH, threads=1, cache_dir="")


def alone(denoiser: Any, image: ImageParams) -> npt.NDArray[np.uint8]:
    """Sample an image alone."""
    plan = build_plan(denoiser.config.diffusion, image.plan.sampler, image.plan.spec, image.plan.eta)
    spec = ImageSpec(
        seed=image.seed, image_index=image.image_index, class_index=image.class_index, cfg_scale=image.cfg_scale
    )
    return sample_images(AsNetwork(denoiser), plan, [spec], xp=np)[0]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_service_gives_the_pixels_of_the_one_image_sampler(exports: Exports, name: str) -> None:
    folder = exports.bundled()
    settings = Settings.model_validate(
        {"models": (folder,), "backend": name, "max_rows": WIDTH, "threads": 1, "cache_dir": ""}
    )
    app = create_app(settings)

    async def ask() -> tuple[bytes, dict[str, Any]]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=PATIENCE_S
            ) as client,
        ):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(POLL_S)
            body = {"class": ["Bag", "Coat", "Shirt"], "steps": 4, "seed": 3, "cfg_scale": 2.0}
            answer = await client.post("/v1/generate", json=body, headers={"Accept": "application/x-npz"})
            assert answer.status_code == 200, answer.text
            return answer.content, (await client.get("/v1/models")).json()

    content, models = run_async(ask())
    assert name in str(models)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        pixels = arrays["arr_0"]
    denoiser = load_denoiser(folder, name, OPTIONS)
    assert denoiser.config.class_names is not None
    for index, class_name in enumerate(("Bag", "Coat", "Shirt")):
        image = ImageParams(
            plan=PlanKey(sampler="ancestral", spec="4"),
            num_steps=4,
            seed=3,
            image_index=index,
            class_index=denoiser.config.class_names.index(class_name),
            cfg_scale=2.0,
        )
        np.testing.assert_array_equal(pixels[index], alone(denoiser, image))


@pytest.fixture(scope="module")
def make_engine(exports: Exports) -> Callable[[], tuple[Any, Engine]]:
    folder: Path = exports.checkpoint() / "artifact"
    # float32: in bfloat16, one row of this tiny network in about 300 is rounded differently when it is alone in a batch
    options = BackendOptions(max_rows=WIDTH, threads=1, cache_dir="", precision="fp32")
    denoiser = load_denoiser(folder, "openvino", options)

    def make() -> tuple[Any, Engine]:
        config = EngineConfig(max_rows=WIDTH)
        runner = ArrayRunner(denoiser, config)
        runner.warm_up()
        return denoiser, Engine({"m": runner}, config, Metrics())

    return make


@pytest.mark.parametrize("seed", range(count(20, 20)))
def test_images_that_join_and_leave_equal_images_sampled_alone(
    make_engine: Callable[[], tuple[Any, Engine]], seed: int
) -> None:
    denoiser, engine = make_engine()
    rng = np.random.default_rng(seed)
    images: dict[str, ImageParams] = {}
    aborted: set[str] = set()
    results: list[ImageResult] = []
    while len(images) < 12 or engine.has_work():
        if len(images) < 12 and rng.random() < 0.6:
            steps = int(rng.integers(2, 6))
            request_id = str(len(images))
            images[request_id] = ImageParams(
                plan=PlanKey(sampler=rng.choice(["ancestral", "ddim"]).item(), spec=str(steps)),
                num_steps=steps,
                seed=int(rng.integers(2**53)),
                image_index=int(rng.integers(5)),
                class_index=int(rng.integers(10)),
                cfg_scale=1.0,
            )
            engine.add(generation(request_id, images[request_id]), submitted_at=0.0)
        if images and rng.random() < 0.1:
            gone = str(rng.integers(len(images)))
            engine.abort(gone)
            aborted.add(gone)
        results += engine.step()

    finished = {result.request_id: result for result in results if result.pixels is not None}
    assert set(finished) >= set(images) - aborted
    for request_id, result in finished.items():
        np.testing.assert_array_equal(result.pixels, alone(denoiser, images[request_id]))
