"""An artifact served without torch: it gives the pixels of the one-image sampler, for images alone and in mixed
batches.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from diffusion.config import CheckpointConfig
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.backends.base import BackendOptions
from service.backends.select import load_denoiser
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GivenArrays, ImageParams, ImageResult, ImageStatus, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.http.app import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.counts import LONG, count
from tests.denoisers import AsNetwork
from tests.exports import Exports
from tests.fakes import generation
from tests.given_images import CHAINS, output_of, sampled_alone, with_chain
from tests.integration.in_process import client_of
from tests.waiting import run_async

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
        async with client_of(app) as client:
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


Setup = tuple[Any, Engine]


CONDITIONED = pytest.param(
    "conditioned", marks=pytest.mark.skipif(not LONG, reason="traces a graph: IDDPM_TEST_LONG=1")
)


@pytest.fixture(scope="module", params=["classes", CONDITIONED])
def make_engine(exports: Exports, request: pytest.FixtureRequest) -> Callable[[], Setup]:
    folder = exports.conditioned(cond_channels=2) if request.param == "conditioned" else exports.checkpoint()
    # float32: in bfloat16, one row of this tiny network in about 300 is rounded differently when it is alone in a batch
    options = BackendOptions(max_rows=WIDTH, threads=1, cache_dir="", precision="fp32")
    denoiser = load_denoiser(folder / "artifact", "openvino", options)

    def make() -> Setup:
        config = EngineConfig(max_rows=WIDTH)
        runner = ArrayRunner(denoiser, config)
        runner.warm_up()
        return denoiser, Engine({"m": runner}, config, Metrics())

    return make


def any_image(config: CheckpointConfig, rng: np.random.Generator, chain: int | None) -> ImageParams:
    """Draw an image of a chain of `CHAINS`, or of a usual one; conditioned, if the model needs that."""
    steps = int(rng.integers(2, 6))
    model = config.model
    image = ImageParams(
        plan=PlanKey(sampler=rng.choice(["ancestral", "ddim"]).item(), spec=str(steps)),
        num_steps=steps,
        seed=int(rng.integers(2**53)),
        image_index=int(rng.integers(5)),
        class_index=int(rng.integers(model.num_classes or 1)),
        cfg_scale=float(rng.choice([1.0, 2.5])) if model.null_class else 1.0,
    )
    if chain is not None:
        image = with_chain(image, chain, int(rng.integers(2)), as_values=bool(rng.integers(2)), config=config)
    if model.cond_shape is None:
        return image
    cond = rng.uniform(-1, 1, model.cond_shape).astype(np.float32)
    return replace(image, given=replace(image.given or GivenArrays(), cond=cond))


@pytest.mark.parametrize("seed", range(count(20, 20)))
def test_images_of_all_kinds_that_join_and_leave_equal_images_sampled_alone(
    make_engine: Callable[[], Setup], seed: int
) -> None:
    denoiser, engine = make_engine()
    rng = np.random.default_rng(seed)
    waiting = [any_image(denoiser.config, rng, chain) for chain in (*range(len(CHAINS)), *[None] * 4)]
    rng.shuffle(waiting)
    images: dict[str, ImageParams] = {}
    aborted: set[str] = set()
    results: list[ImageResult] = []
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.6:
            request_id = str(len(images))
            images[request_id] = waiting.pop()
            engine.add(generation(request_id, images[request_id]), submitted_at=0.0)
        if images and rng.random() < 0.05:
            gone = str(rng.integers(len(images)))
            engine.abort(gone)
            aborted.add(gone)
        results += engine.step()

    finished = {result.request_id: result for result in results if result.status is ImageStatus.DONE}
    assert set(finished) >= set(images) - aborted
    network = AsNetwork(denoiser)
    for request_id, result in finished.items():
        expected = sampled_alone(images[request_id], network, diffusion=denoiser.config.diffusion)
        assert output_of(result) == expected, images[request_id]
