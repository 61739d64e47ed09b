"""Models with conditioning channels over HTTP: what is sent reaches the network, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from diffusion.conditioning import enlarged
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.update import from_uint8_reversibly
from formats.given_files import read_images
from formats.given_shapes import FITS, Fit
from service.http.app import assemble
from service.settings import Settings
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import tiny_config
from tests.integration.exact_service import serving
from tests.integration.test_given_images import MASK, PIXELS, array_of, npy, png
from tests.waiting import PATIENCE_S

MODELS = {
    "maps": ExactDenoiser(tiny_config(cond_channels=2)),
    "upsampler": ExactDenoiser(tiny_config(low_res_size=4)),
    "plain": ExactDenoiser(tiny_config()),
}
RNG = np.random.default_rng(1)
MAPS = RNG.uniform(-1, 1, (3, 8, 8, 2)).astype(np.float32)
SMALL = RNG.integers(0, 256, (4, 4, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(assemble(Settings(models=tuple(map(Path, MODELS)), max_rows=8), dict(MODELS))) as address:
        yield address


def post(address: str, path: str = "generate", **body: Any) -> httpx.Response:
    fields = {"class": 1, "seed": 7, "steps": 4, "format": "npy", "cfg_scale": 1.5} | body
    return httpx.post(f"http://{address}/v1/{path}", json=fields, timeout=PATIENCE_S)


def images_of(answer: httpx.Response) -> npt.NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    return np.stack([array_of(image["b64_json"]).reshape(8, 8, 1) for image in answer.json()["images"]])


def alone(model: str, cond: npt.NDArray[np.float32], image_index: int = 0) -> npt.NDArray[np.uint8]:
    denoiser = MODELS[model]
    spec = ImageSpec(seed=7, image_index=image_index, class_index=1, cfg_scale=1.5, cond=cond)
    plan = build_plan(denoiser.config.diffusion, "ancestral", "4")
    return sample_images(AsNetwork(denoiser), plan, [spec], xp=np)[0]


def test_each_image_is_conditioned_on_its_own_array_or_all_on_one(address: str) -> None:
    conds = MAPS.transpose(0, 3, 1, 2)
    each = images_of(post(address, model="maps", cond=npy(MAPS)))
    np.testing.assert_array_equal(each, [alone("maps", conds[k], k) for k in range(3)])
    shared = images_of(post(address, model="maps", cond=npy(MAPS[0]), n=2))
    np.testing.assert_array_equal(shared, [alone("maps", conds[0], k) for k in range(2)])


def test_an_upsampler_gets_the_small_picture_enlarged(address: str) -> None:
    expected = alone("upsampler", enlarged(from_uint8_reversibly(SMALL[None]), 8, 8)[0])
    for picture in (png(SMALL), npy(SMALL)):
        np.testing.assert_array_equal(images_of(post(address, model="upsampler", cond=picture))[0], expected)
    values = images_of(post(address, model="upsampler", cond=npy(SMALL.astype(np.float32))))[0]  # in the data's units
    assert np.abs(values.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("fit", FITS)
def test_a_conditioning_image_of_another_shape_is_fitted_on_request(address: str, fit: Fit) -> None:
    picture = npy(RNG.integers(0, 256, (12, 8, 1), dtype=np.uint8))
    fitted = read_images(base64.b64decode(picture), (4, 4, 1), most=1, fit=fit)
    wanted = images_of(post(address, model="upsampler", cond=npy(fitted)))
    np.testing.assert_array_equal(images_of(post(address, model="upsampler", cond=picture, fit=fit)), wanted)
    x_t = {"x_t": npy(np.zeros((8, 8, 1), np.float32)), "timestep": 5}
    for path, body in (("encode", {"image": png(PIXELS), "steps": 4}), ("denoise", x_t)):
        body |= {"model": "maps", "class": 0, "cond": npy(MAPS[0, :4])}
        statuses = [
            httpx.post(f"http://{address}/v1/{path}", json=body | options, timeout=PATIENCE_S).status_code
            for options in ({}, {"fit": fit})
        ]
        assert statuses == [422, 200]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("generate", {}, "is valid only with `image` or `cond`"),
        ("denoise", {"x_t": npy(np.zeros((8, 8, 1), np.float32)), "timestep": 5}, "is valid only with `cond`"),
    ],
)
def test_fit_needs_something_to_fit(address: str, path: str, body: dict[str, Any], message: str) -> None:
    url = f"http://{address}/v1/{path}"
    answer = httpx.post(url, json={"model": "plain", "fit": "crop", **body}, timeout=PATIENCE_S)
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "fit", "message": message}]


def test_conditioning_goes_with_a_kept_part(address: str) -> None:
    answer = post(address, model="maps", cond=npy(MAPS[:2]), image=png(PIXELS), mask=png(MASK))
    images = images_of(answer)
    np.testing.assert_array_equal(images[:, MASK == 0], np.repeat(PIXELS[None], 2, axis=0)[:, MASK == 0])
    assert not np.array_equal(images[0], images[1])
    assert answer.json()["images"][0]["start_timestep"] is not None
    assert post(address, model="maps", cond=npy(MAPS[0])).json()["images"][0]["start_timestep"] is None


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ({"model": "maps"}, "is required by the model: a conditioning image, 8 pixels wide and 8 high, of 2 channels"),
        ({"model": "upsampler"}, "is required by the model: the low-resolution image, 4 pixels wide and 4 high, of 1"),
        ({"model": "plain", "cond": png(SMALL)}, "must be absent: the model takes no conditioning image"),
        ({"model": "upsampler", "cond": png(PIXELS)}, "must be 4 pixels wide and 4 high"),
        ({"model": "maps", "cond": npy(MAPS[..., :1])}, "must have shape [8, 8, 2]"),
        ({"model": "maps", "cond": npy(MAPS * 1e6)}, "must hold values of at most 1000"),
        ({"model": "maps", "cond": npy(MAPS), "n": 2}, "must hold 1 or 2 arrays; got 3"),
        ({"model": "maps", "cond": "?"}, "must be a file in base64"),
    ],
)
def test_an_error_names_the_field_and_what_is_wanted(address: str, body: dict[str, Any], rule: str) -> None:
    answer = post(address, **body)
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert (error["field"], rule in error["message"]) == ("cond", True), error


def test_other_interfaces_refuse_models_that_need_conditioning(address: str) -> None:
    body = {"model": "maps", "prompt": "1", "n": 1}
    answer = httpx.post(f"http://{address}/v1/images/generations", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 400
    assert "cond: is required by the model" in answer.json()["error"]["message"]


def test_the_list_of_models_says_what_is_wanted(address: str) -> None:
    models = httpx.get(f"http://{address}/v1/models", timeout=PATIENCE_S).json()["models"]
    assert {model["name"]: model["cond"] for model in models} == {
        "maps": {"height": 8, "width": 8, "channels": 2, "low_resolution": False, "value_range": [-1, 1]},
        "upsampler": {"height": 4, "width": 4, "channels": 1, "low_resolution": True, "value_range": [0, 255]},
        "plain": None,
    }


def test_raw_calls_and_encodings_are_conditioned_too(address: str) -> None:
    x_t = npy(RNG.standard_normal((2, 8, 8, 1)).astype(np.float32))

    def eps(**cond: Any) -> npt.NDArray[Any]:
        body = {"model": "maps", "x_t": x_t, "timestep": 500, "class": 1} | cond
        answer = httpx.post(f"http://{address}/v1/denoise", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        with np.load(io.BytesIO(answer.content)) as file:
            return np.asarray(file["eps"])

    first, both = eps(cond=npy(MAPS[0])), eps(cond=npy(MAPS[:2]))
    np.testing.assert_array_equal(first[0], both[0])
    assert not np.array_equal(first[1], both[1])
    for path, body in (("denoise", {"x_t": x_t, "timestep": 5}), ("encode", {"image": png(PIXELS)})):
        answer = httpx.post(f"http://{address}/v1/{path}", json={"model": "maps", **body}, timeout=PATIENCE_S)
        assert answer.status_code == 422
        assert "cond: is required by the model" in answer.json()["detail"]
    body = {"model": "maps", "image": png(PIXELS), "cond": npy(MAPS[0]), "steps": 4, "class": 0}
    assert httpx.post(f"http://{address}/v1/encode", json=body, timeout=PATIENCE_S).status_code == 200
