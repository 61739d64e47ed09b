"""Given images over HTTP: begin with them, keep a part of them, arrays in and out, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from diffusion.chains import Chain, Resample, build_chain
from diffusion.sampling import ImageSpec, sample_values
from diffusion.update import from_uint8_reversibly, to_uint8
from formats.value_range import ValueRange
from service.requests.given import given_images
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import tiny_config
from tests.integration.exact_service import exact_app, serving
from tests.integration.in_process import running
from tests.pictures import deep_png, jpeg_announcing
from tests.waiting import PATIENCE_S, runs

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[2:6, 3:] = 255
LATENT = RNG.standard_normal((8, 8, 1)).astype(np.float32)
SHORT = base64.b64encode(deep_png(np.zeros((7, 8, 1)), size=(8, 8))).decode()
"""A picture with fewer rows than its header says."""


def png(pixels: npt.NDArray[Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.squeeze(pixels)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def short_jpeg() -> str:
    """Return a picture of 8 x 8 pixels whose header announces 8 x 48."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(buffer, "JPEG")
    return base64.b64encode(jpeg_announcing(buffer.getvalue(), 8, 48)).decode()


def npy(array: npt.NDArray[Any]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def array_of(text: str) -> npt.NDArray[Any]:
    loaded = np.load(io.BytesIO(base64.b64decode(text)))
    return np.asarray(loaded if isinstance(loaded, np.ndarray) else loaded["arr_0"])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(exact_app()) as address:
        yield address


def post(address: str, **body: Any) -> httpx.Response:
    fields = {"class": 1, "seed": 7, "steps": 5, "format": "npy", "cfg_scale": 1.5} | body
    return httpx.post(f"http://{address}/v1/generate", json=fields, timeout=PATIENCE_S)


def alone(chain: Chain, given: npt.NDArray[Any] | None = None, masked: bool = False, index: int = 0) -> Any:
    """Sample without a service; return values [C, H, W] of the network."""
    denoiser = ExactDenoiser(tiny_config())
    spec = ImageSpec(
        seed=7,
        image_index=index,
        class_index=1,
        cfg_scale=1.5,
        given=given,
        mask=(MASK[None] / np.float32(255)).astype(np.float32) if masked else None,
    )
    return sample_values(AsNetwork(denoiser), build_chain(denoiser.config.diffusion, chain), [spec], xp=np)[0]


NETWORK_LATENT = LATENT.transpose(2, 0, 1)
IMAGE = from_uint8_reversibly(PIXELS[None])[0]


@pytest.mark.parametrize(
    ("fields", "chain", "given", "masked"),
    [
        ({"image": png(PIXELS), "strength": 0.6}, {"strength": 0.6}, IMAGE, False),
        ({"image": npy(PIXELS), "strength": 0}, {"strength": 0.0}, IMAGE, False),
        (
            {"image": npy(PIXELS), "start_timestep": 500, "sampler": "ddim"},
            {"timestep": 500, "sampler": "ddim"},
            IMAGE,
            False,
        ),
        (
            {"latent": npy(LATENT), "sampler": "dpm++"},
            {"from_latent": True, "sampler": "dpm++"},
            NETWORK_LATENT,
            False,
        ),
        ({"image": png(PIXELS), "mask": png(MASK)}, {}, IMAGE, True),
        (
            {"image": png(PIXELS), "mask": png(MASK), "strength": 0.8, "resample": {"times": 2, "jump": 2}},
            {"strength": 0.8, "resample": Resample(2, 2)},
            IMAGE,
            True,
        ),
        ({"clip": False}, {"clip": False}, None, False),
    ],
)
def test_chains_with_given_images(
    address: str, fields: dict[str, Any], chain: dict[str, Any], given: Any, masked: bool
) -> None:
    wanted = Chain(**{"sampler": "ancestral", "spec": "5"} | chain)
    values = alone(wanted, given, masked)
    answer = post(address, **fields)
    assert answer.status_code == 200, answer.text
    image = answer.json()["images"][0]
    plan = build_chain(tiny_config().diffusion, wanted)
    assert image["steps"] == plan.num_steps
    assert image.get("start_timestep") == (None if given is None else plan.timesteps[0])
    pixels = array_of(image["b64_json"])[0]
    assert np.array_equal(pixels, to_uint8(values[None])[0])
    floats = array_of(post(address, **fields, dtype="float32").json()["images"][0]["b64_json"])[0]
    assert floats.dtype == np.float32
    made = MASK[..., None] > 0 if masked else np.ones((8, 8, 1), bool)
    assert np.array_equal(floats[made], ValueRange((0,), (255,)).to_data(values)[made])
    if masked:
        assert np.array_equal(pixels[~made], PIXELS[~made])
        assert np.array_equal(floats[~made], PIXELS[~made].astype(np.float32))


def test_kept_float_values_are_equal_bit_for_bit(address: str) -> None:
    given = (RNG.random((8, 8, 1)) * 255).astype(np.float32)
    fields: dict[str, Any] = {"image": npy(given), "mask": png(MASK), "format": "npz", "dtype": "float32"}
    floats = array_of(post(address, **fields).json()["images"][0]["b64_json"])[0]
    kept = MASK == 0
    assert np.array_equal(floats[kept], given[kept])
    assert not np.array_equal(floats[~kept], given[~kept])


def test_kept_values_of_sixteen_bit_pictures_have_full_precision(address: str) -> None:
    deep = RNG.integers(0, 65536, (8, 8, 1), dtype=np.uint16)
    opaque = np.dstack([deep, np.full_like(deep, 65535)])
    file = base64.b64encode(deep_png(opaque)).decode()
    fields = {"image": file, "mask": png(MASK), "dtype": "float32"}
    floats = array_of(post(address, **fields).json()["images"][0]["b64_json"])[0]
    np.testing.assert_allclose(floats[MASK == 0], deep[MASK == 0] / 257, rtol=1e-6)


def test_one_array_per_image_and_a_file_as_the_answer(address: str) -> None:
    images = RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    fields = {"image": npy(images), "strength": 0.4, "class": 1, "seed": 7, "steps": 5, "cfg_scale": 1.5}
    accept = {"Accept": "application/x-npy"}
    answer = httpx.post(f"http://{address}/v1/generate", json=fields, headers=accept, timeout=PATIENCE_S)
    assert answer.headers["content-type"] == "application/x-npy"
    found = np.load(io.BytesIO(answer.content))
    chain = Chain(sampler="ancestral", spec="5", strength=0.4)
    for k, image in enumerate(from_uint8_reversibly(images)):
        assert np.array_equal(found[k], to_uint8(alone(chain, image, index=k)[None])[0])


def test_progress_counts_the_calls_of_the_longer_plan(address: str) -> None:
    fields = {"image": png(PIXELS), "mask": png(MASK), "resample": {"times": 3, "jump": 1}, "stream": True}
    steps = build_chain(tiny_config().diffusion, Chain(spec="5", resample=Resample(3, 1))).num_steps
    assert f'"steps":{steps}' in post(address, **fields, preview_every=2).text
    assert steps > 5


@pytest.mark.parametrize(
    ("fields", "field", "rule"),
    [
        ({"strength": 0.5}, "strength", "is valid only with `image`"),
        ({"image": png(PIXELS)}, "image", "needs `strength`, `start_timestep` or `mask`"),
        ({"mask": png(MASK)}, "mask", "is valid only with `image`"),
        ({"start_timestep": 5}, "start_timestep", "is valid only with `image` or `latent`"),
        ({"image": png(PIXELS), "strength": 0.5, "start_timestep": 5}, "start_timestep", "not both"),
        ({"image": png(PIXELS), "start_timestep": 1000}, "start_timestep", "must be 0..999; got 1000"),
        ({"image": png(PIXELS), "strength": 0.5, "resample": {"times": 2, "jump": 2}}, "resample", "only with `mask`"),
        ({"latent": npy(LATENT), "mask": png(MASK)}, "mask", "is not valid with `latent`"),
        ({"latent": png(PIXELS)}, "latent", "npy or npz"),
        ({"latent": npy(LATENT * np.nan)}, "latent", "finite"),
        ({"latent": npy(LATENT * 1e6)}, "latent", "at most 1000"),
        ({"image": "not base64", "strength": 0.5}, "image", "base64"),
        ({"image": "é", "strength": 0.5}, "image", "base64"),
        ({"image": SHORT, "strength": 0.5}, "image", "its header announces 8 x 8 pixels"),
        ({"image": png(PIXELS), "mask": SHORT}, "mask", "its header announces 8 x 8 pixels"),
        ({"image": short_jpeg(), "strength": 0.5, "fit": "crop"}, "image", "its header announces 8 x 48 pixels"),
        ({"image": png(PIXELS), "mask": short_jpeg(), "fit": "crop"}, "mask", "its header announces 8 x 48 pixels"),
        ({"image": png(PIXELS[:7]), "strength": 0.5}, "image", "must be 8 pixels wide and 8 high"),
        ({"image": npy(np.zeros((3, 8, 8, 1))), "strength": 0.5, "n": 2}, "image", "must hold 1 or 2 arrays; got 3"),
        ({"image": npy(np.zeros((2, 8, 8, 1))), "mask": npy(np.zeros((3, 8, 8)))}, "mask", "must hold 1 or 2 masks"),
        ({"dtype": "float32", "format": "png"}, "dtype", 'is valid only with format "npz" or "npy"'),
        ({"compression": 3}, "compression", "not compressed"),
    ],
)
def test_what_makes_no_sense_is_refused(address: str, fields: dict[str, Any], field: str, rule: str) -> None:
    answer = post(address, **fields)
    assert answer.status_code == 422, answer.text
    [error] = answer.json()["errors"]
    assert error["field"] == field
    assert rule in error["message"]


def test_fit(address: str) -> None:
    answer = post(address, image=png(np.zeros((20, 30), np.uint8)), strength=0.5, fit="crop")
    assert answer.status_code == 200, answer.text


def test_the_samplers_are_listed(address: str) -> None:
    listed = httpx.get(f"http://{address}/v1/models").json()["samplers"]
    assert {"name": "ddim", "options": ["eta"], "recommended_steps": [50, 250]} in listed
    assert {"name": "dpm++", "options": [], "recommended_steps": [10, 25]} in listed


def test_a_body_beyond_what_the_shapes_need_is_refused_before_it_is_read(address: str) -> None:
    for path, most in (
        ("/v1/generate", 65536 + (8 << 20)),
        ("/v1/encode", 65536 + (8 << 20)),
        ("/v1/denoise", 65536 + (8 << 20)),
        ("/v2/models/tiny/infer", 65536 + (8 << 20)),
        ("/v2/models/tiny/versions/1/infer", 65536 + (8 << 20)),
        ("/v1/images/generations", 65536),
    ):
        connection = http.client.HTTPConnection(address)
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(most + 1))
        connection.endheaders()  # and no body
        answer = connection.getresponse()
        assert answer.status == 413
        assert f"at most {most} bytes" in answer.read().decode()
        connection.close()
    large = "x" * 100_000
    assert post(address, image=large, strength=0.5).status_code == 422
    assert httpx.post(f"http://{address}/v1/images/generations", json={"prompt": large}).status_code == 413


@runs
async def test_memory_of_given_images_is_bounded_while_requests_wait() -> None:
    images = npy(np.zeros((2, 8, 8, 1), np.float32))
    async with running(max_given_bytes=800) as service:
        service.denoiser.let.clear()
        first = asyncio.create_task(service.generate(image=images, strength=0.5, steps=4, cfg_scale=1))
        await service.until_accepted(1)
        refused = await service.generate(image=images, strength=0.5, steps=4, cfg_scale=1)
        assert refused.status_code == 503
        assert "given images take 512 bytes of memory, the limit is 800" in refused.json()["detail"]
        service.denoiser.let.set()
        assert (await first).status_code == 200
        assert (await service.generate(image=images, strength=0.5, steps=4, cfg_scale=1)).status_code == 200
        too_many = await service.generate(image=images, mask=png(MASK), steps=4, cfg_scale=1)
        assert too_many.status_code == 422


def test_each_image_has_memory_of_its_own() -> None:
    config = tiny_config()
    images, masks = np.zeros((3, 8, 8, 1), np.float32), np.ones((3, 8, 8), np.float32)
    given = given_images(images, masks, config)
    arrays = [array for one in given for array in (one.image, one.mask, one.original) if array is not None]
    assert len(arrays) == 9
    for array in arrays:  # a slot that keeps one does not keep those of the whole request
        assert array.base is None
        assert array.flags.c_contiguous
    shared = given_images(images[:1], masks, config)
    assert shared[0].image is shared[2].image


RESAMPLED = {"times": 20, "jump": 1}
"""Of 10 steps: 9 jumps back by one step, 19 times each; 181 network calls."""


def kept(**fields: Any) -> dict[str, Any]:
    return {"image": png(PIXELS), "mask": png(MASK), "steps": 10, "cfg_scale": 1, "seed": 7} | fields


@runs
async def test_limits_count_the_network_calls_of_resampling() -> None:
    async with running(max_row_steps=181) as service:
        answer = await service.generate(**kept(resample=RESAMPLED))
        assert answer.status_code == 200, answer.text
        assert answer.json()["images"][0]["steps"] == 181
        assert await service.metric("iddpm_row_steps_total") == 181
        for fields, field, rule in (
            ({"steps": 11}, "resample", "must lead to at most 181 network calls per image; it leads to 201"),
            ({"n": 2}, "steps", "images x steps must be at most 181 per request; got 2 x 181 = 362"),
            ({"cfg_scale": 2}, "steps", "got 1 x 181 x 2 = 362"),
        ):
            refused = await service.generate(**kept(resample=RESAMPLED) | fields)
            assert refused.status_code == 422, refused.text
            (error,) = refused.json()["errors"]
            assert (error["field"], rule in error["message"]) == (field, True), error
        # No jump of 10 steps fits into 10 steps: what counts is the number of calls, not steps x times
        answer = await service.generate(**kept(resample={"times": 20, "jump": 10}))
        assert answer.json()["images"][0]["steps"] == 10
        assert (await service.generate(**kept(n=6))).status_code == 200


@runs
async def test_predictions_and_deadlines_count_the_network_calls_of_resampling() -> None:
    async with running() as service:
        predicted = []
        for fields in ({}, {"resample": RESAMPLED}):
            refused = await service.generate(**kept(**fields, deadline_s=1e-9))
            assert (refused.status_code, refused.json()["title"]) == (422, "Deadline cannot be met")
            predicted.append(refused.json()["predicted_finish_s"])
        assert predicted[1] == pytest.approx(18.1 * predicted[0])  # no step was taken in between
        between = 9 * predicted[0]
        assert (await service.generate(**kept(resample=RESAMPLED, deadline_s=between))).status_code == 422
        etas = []
        for fields in ({"deadline_s": between}, {"resample": RESAMPLED}):
            answer = await service.generate(**kept(**fields, stream=True, format="npy"))
            assert answer.status_code == 200, answer.text
            first = answer.text.split("data: ", 1)[1].splitlines()[0]
            etas.append(json.loads(first)["eta_s"])
        assert etas[1] > 4 * etas[0] > 0  # as measured: the duration of a step may have changed in between
