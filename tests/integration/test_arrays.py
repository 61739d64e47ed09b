"""POST /v1/encode and POST /v1/denoise: latents of images, and single calls of the network."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from diffusion.chains import Chain, build_chain, encoding_end
from diffusion.network_inputs import NetworkInputs
from diffusion.sampling import ImageSpec, sample_values
from diffusion.schedules import Schedule, named_betas
from diffusion.update import from_uint8_reversibly
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import tiny_config
from tests.integration.exact_service import exact_app, serving
from tests.integration.test_given_images import PIXELS, array_of, npy, png
from tests.waiting import PATIENCE_S

CONFIG = tiny_config()
X_T = np.random.default_rng(1).standard_normal((3, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(exact_app(max_row_steps=2000)) as address:
        yield address


def post(address: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"http://{address}/v1/{path}", json=body, timeout=PATIENCE_S)


def arrays(answer: httpx.Response) -> dict[str, npt.NDArray[Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/x-npz"
    assert answer.headers["X-Numerics-Id"]
    with np.load(io.BytesIO(answer.content)) as file:
        return dict(file)


def encoded_alone(chain: Chain, class_index: int, cfg_scale: float = 1.0) -> npt.NDArray[np.float32]:
    spec = ImageSpec(seed=0, class_index=class_index, cfg_scale=cfg_scale, given=from_uint8_reversibly(PIXELS[None])[0])
    values = sample_values(AsNetwork(ExactDenoiser(CONFIG)), build_chain(CONFIG.diffusion, chain), [spec], xp=np)[0]
    return np.asarray(values, dtype=np.float32).transpose(1, 2, 0)


@pytest.mark.parametrize(
    ("fields", "chain", "cfg_scale"),
    [
        ({"steps": 7}, {"spec": "7"}, 1.0),
        ({"steps": 7, "end_timestep": 400, "cfg_scale": 1.5}, {"spec": "7", "timestep": 400}, 1.5),
        ({"steps": 7, "end_timestep": 0, "clip": False}, {"spec": "7", "timestep": 0, "clip": False}, 1.0),
    ],
)
def test_an_image_is_encoded(address: str, fields: dict[str, Any], chain: dict[str, Any], cfg_scale: float) -> None:
    answer = post(address, "encode", image=png(PIXELS), **{"class": 2}, **fields)
    wanted = Chain(kind="encode", **chain)
    found = arrays(answer)["arr_0"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], encoded_alone(wanted, 2, cfg_scale))
    assert int(answer.headers["X-Timestep"]) == encoding_end(CONFIG.diffusion, wanted)


def test_a_latent_is_decoded_to_its_image(address: str) -> None:
    answer = post(address, "encode", image=npy(PIXELS), format="npy", steps=250, **{"class": 2})
    assert answer.headers["Content-Type"] == "application/x-npy"
    latent = np.load(io.BytesIO(answer.content))
    body = {"latent": npy(latent), "sampler": "ddim", "steps": 250, "class": 2, "cfg_scale": 1, "format": "npy"}
    back = array_of(post(address, "generate", **body).json()["images"][0]["b64_json"])[0]
    assert np.abs(back.astype(int) - PIXELS).mean() < 2


def test_several_images_have_classes_of_their_own(address: str) -> None:
    images = np.stack([PIXELS, 255 - PIXELS, PIXELS])
    together = arrays(post(address, "encode", image=npy(images), steps=5, **{"class": [1, 0, 3]}))["arr_0"]
    assert together.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(together[2], encoded_alone(Chain(kind="encode", spec="5"), 3))


def test_the_network_is_called_with_rows_of_different_timesteps_and_classes(address: str) -> None:
    found = arrays(post(address, "denoise", x_t=npy(X_T), timestep=[0, 500, 999], **{"class": [3, 0, 2]}))
    assert found.keys() == {"eps", "log_variance"}
    denoiser = ExactDenoiser(CONFIG)
    t = np.array([0, 500, 999])
    inputs: NetworkInputs[Any] = NetworkInputs(
        X_T.transpose(0, 3, 1, 2), denoiser.embed_timesteps(t.astype(np.float32)), np.array([3, 0, 2])
    )
    out = np.asarray(denoiser(inputs))
    np.testing.assert_array_equal(found["eps"], out[:, :1].transpose(0, 2, 3, 1))
    schedule = Schedule(named_betas(CONFIG.diffusion.noise_schedule, CONFIG.diffusion.num_timesteps))
    low, high = schedule.posterior_log_variance_clipped[t], np.log(schedule.betas)[t]
    part = (out[:, 1:] + 1) / 2
    expected = low[:, None, None, None] * (1 - part) + high[:, None, None, None] * part
    np.testing.assert_allclose(found["log_variance"], expected.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_without_a_class_the_null_class_answers_and_guidance_combines_both(address: str) -> None:
    def call(**fields: Any) -> npt.NDArray[Any]:
        return arrays(post(address, "denoise", x_t=npy(X_T[:1]), timestep=300, **fields))["eps"]

    null, conditional, guided = call(), call(**{"class": 1}), call(**{"class": 1, "cfg_scale": 3})
    assert not np.array_equal(null, conditional)
    np.testing.assert_allclose(guided, null + 3 * (conditional - null), rtol=1e-4, atol=1e-4)


def test_a_ddim_chain_of_raw_calls_gives_the_services_own_pixels(address: str) -> None:
    timesteps = build_chain(CONFIG.diffusion, Chain(sampler="ddim", spec="10")).timesteps
    schedule = Schedule(named_betas(CONFIG.diffusion.noise_schedule, CONFIG.diffusion.num_timesteps))
    abar = np.append(schedule.alphas_cumprod[timesteps], 1.0)
    x: npt.NDArray[Any] = X_T[:1]
    for k, t in enumerate(timesteps):
        eps = arrays(post(address, "denoise", x_t=npy(x.astype(np.float32)), timestep=int(t), **{"class": 3}))["eps"]
        x0 = np.clip((x - np.sqrt(1 - abar[k]) * eps) / np.sqrt(abar[k]), -1, 1)
        direction = (x - np.sqrt(abar[k]) * x0) / np.sqrt(1 - abar[k])
        x = np.sqrt(abar[k + 1]) * x0 + np.sqrt(1 - abar[k + 1]) * direction
    own = np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8)
    body = {"latent": npy(X_T[:1]), "sampler": "ddim", "steps": 10, "class": 3, "cfg_scale": 1, "format": "npy"}
    theirs = array_of(post(address, "generate", **body).json()["images"][0]["b64_json"])
    assert np.abs(own.astype(int) - theirs).max() <= 1
    assert (own == theirs).mean() > 0.95


@pytest.mark.parametrize(
    ("path", "fields", "field", "message"),
    [
        ("encode", {}, "image", "required"),
        ("encode", {"image": "!"}, "image", "base64"),
        ("encode", {"image": png(PIXELS), "steps": 1001}, "steps", "must be 2..1000"),
        ("encode", {"image": png(PIXELS), "end_timestep": 1000}, "end_timestep", "must be 0..999; got 1000"),
        ("encode", {"image": png(PIXELS), "class": [1, 2]}, "class", "a list of 1, one per array; got 2"),
        ("encode", {"image": png(PIXELS), "class": 99}, "class", "index must be 0..3; got 99"),
        ("encode", {"image": png(PIXELS), "seed": 1}, "seed", "seed"),
        ("encode", {"image": npy(np.zeros((9, 8, 1), np.uint8))}, "image", "8"),
        ("encode", {"image": npy(np.zeros((64, 8, 8, 1), np.uint8)), "steps": 100}, "steps", "at most 2000"),
        ("denoise", {"x_t": npy(X_T)}, "timestep", "required"),
        ("denoise", {"x_t": npy(X_T), "timestep": 1000}, "timestep", "must be 0..999; got 1000"),
        ("denoise", {"x_t": npy(X_T), "timestep": [1, 2]}, "timestep", "a list of 3, one per array; got 2"),
        ("denoise", {"x_t": npy(X_T), "timestep": -1}, "timestep", "0"),
        ("denoise", {"x_t": npy(X_T * np.nan), "timestep": 1}, "x_t", "finite"),
        ("denoise", {"x_t": npy(X_T * 1e6), "timestep": 1}, "x_t", "at most 1000"),
        ("denoise", {"x_t": npy(PIXELS), "timestep": 1}, "x_t", "floating-point"),
        ("denoise", {"x_t": npy(np.zeros((65, 8, 8, 1), np.float32)), "timestep": 1}, "x_t", "64"),
    ],
)
def test_bad_fields_are_named(address: str, path: str, fields: dict[str, Any], field: str, message: str) -> None:
    answer = post(address, path, **fields)
    assert answer.status_code == 422
    problem = answer.json()
    assert field in str(problem["errors"][0]) if "errors" in problem else field in problem["detail"]
    assert message in answer.text


def test_requests_for_arrays_share_batches_with_images(address: str) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=f"http://{address}/v1", timeout=PATIENCE_S) as client:
            image = {"class": 1, "seed": 7, "steps": 5, "format": "npy"}
            encode = {"image": png(PIXELS), "steps": 7, "class": 2}
            raw = {"x_t": npy(X_T[:1]), "timestep": 500, "class": 0}
            calls = [("generate", image), ("encode", encode), ("denoise", raw)] * 4
            answers = await asyncio.gather(*(client.post(path, json=body) for path, body in calls))
            alone = [await client.post(path, json=body) for path, body in calls[:3]]
        for k, answer in enumerate(answers):
            if k % 3:
                assert arrays(answer).keys() == arrays(alone[k % 3]).keys()
                for name, array in arrays(answer).items():
                    np.testing.assert_array_equal(array, arrays(alone[k % 3])[name])
            else:
                assert answer.json()["images"][0]["b64_json"] == alone[0].json()["images"][0]["b64_json"]

    asyncio.run(run())
