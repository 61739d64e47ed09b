"""Given images as tensors of the Open Inference Protocol: equal to native requests, and described in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from service.http.app import assemble
from service.http.kserve.routes import ARRAYS, INPUTS
from service.requests import given
from service.requests.generate_request import GivenOptions
from service.requests.given import body_bytes
from service.settings import Settings
from tests.fakes import tiny_config
from tests.integration.exact_service import serving
from tests.integration.test_conditioning import MAPS, MODELS, SMALL
from tests.integration.test_given_images import LATENT, MASK, PIXELS, array_of, npy
from tests.waiting import PATIENCE_S

COMMON: dict[str, Any] = {"class": "bee", "steps": 5, "seed": 7, "cfg_scale": 1.5}
RNG = np.random.default_rng(4)
FLOATS = RNG.uniform(0, 255, (8, 8, 1)).astype(np.float32)
SEVERAL = RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
TYPES = {np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(assemble(Settings(models=tuple(map(Path, MODELS)), max_rows=8), dict(MODELS))) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address, connection_timeout=PATIENCE_S, network_timeout=PATIENCE_S) as client:
        yield client


def tensors(fields: dict[str, Any], binary: bool = True) -> list[Any]:
    inputs = []
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            datatype, array = TYPES[value.dtype], value
        else:
            datatype = INPUTS[name]
            values = value if isinstance(value, list) else [value]
            array = np.array(values, {"BYTES": np.object_, "INT64": np.int64, "FP32": np.float32}[datatype])
        inputs.append(
            triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array, binary_data=binary)
        )
    return inputs


def native(address: str, model: str, **fields: Any) -> npt.NDArray[np.uint8]:
    files = {name: npy(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    if isinstance(fields.get("resample"), list):
        fields["resample"] = dict(zip(("times", "jump"), fields["resample"], strict=True))
    body = {"model": model, "format": "npy"} | COMMON | fields | files
    answer = httpx.post(f"http://{address}/v1/generate", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return np.stack([array_of(image["b64_json"])[0] for image in answer.json()["images"]])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("plain", {"image": PIXELS, "mask": MASK}),
        ("plain", {"image": PIXELS.astype(np.float32), "strength": 0.6, "sampler": "dpm++"}),
        ("plain", {"image": SEVERAL, "mask": MASK[None] / np.float32(255), "n": 3, "resample": [2, 2]}),
        ("plain", {"image": np.zeros((6, 9, 1), np.uint8), "strength": 0.5, "fit": "crop"}),
        ("plain", {"latent": LATENT[None], "start_timestep": 500, "sampler": "ddim"}),
        ("maps", {"cond": MAPS, "n": 3}),
        ("upsampler", {"cond": SMALL}),
    ],
    ids=["mask", "strength", "one per image", "fit", "latent", "cond", "low resolution"],
)
def test_tritonclient_gets_the_bytes_of_a_native_request(
    client: Any, address: str, model: str, fields: dict[str, Any], binary: bool
) -> None:
    fields = {"class": "bee"} | fields
    sent = fields | {"class": ["bee"] * fields.get("n", 1)}
    images = client.infer(model, tensors(COMMON | sent, binary)).as_numpy("images")
    assert images.tobytes() == native(address, model, **fields).tobytes()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_values_are_those_of_a_native_request(client: Any, address: str, binary: bool, clip: bool) -> None:
    fields = {"class": "bee", "image": PIXELS, "mask": MASK, "n": 2}
    answer = client.infer(
        "plain",
        tensors(COMMON | fields | {"class": ["bee"] * 2}),
        outputs=[triton.InferRequestedOutput(name, binary_data=binary) for name in ("values", "seed")],
        parameters={"clip": clip},
    )
    values = answer.as_numpy("values")
    assert (values.dtype, values.shape, answer.as_numpy("images")) == (np.float32, (2, 8, 8, 1), None)
    assert values.tobytes() == native(address, "plain", dtype="float32", clip=clip, **fields).tobytes()
    assert (values.max() > 255) is not clip


def test_a_body_may_hold_64_images_and_masks_as_lists_or_as_float64() -> None:
    shape = (16, 32, 3)
    model = tiny_config(image_size=shape[:2], image_channels=shape[2], attention_resolutions=()).model
    arrays = [RNG.normal(0, 1e-6, (64, *shape)), RNG.uniform(0, 1, (64, *shape[:2]))]
    lists = sum(len(json.dumps(array.astype(np.float32).ravel().tolist())) for array in arrays)
    files = sum(len(npy(array)) for array in arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(given, "PICTURE_BYTES", 0)
        assert files - 1000 < body_bytes(model) < lists < body_bytes(model, as_lists=True)
        patch.setattr(given, "MOST_TEXT_BYTES", 1000)
        assert body_bytes(model, as_lists=True) == body_bytes(model)


def test_values_are_not_sent_unasked(client: Any) -> None:
    answer = client.infer("plain", tensors(COMMON))
    assert [output["name"] for output in answer.get_response()["outputs"]] == [
        "images",
        "seed",
        "image_index",
        "class_index",
    ]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("fields", [{}, {"image": PIXELS, "mask": MASK}, {"image": FLOATS, "mask": MASK}])
def test_values_and_pixels_of_one_request_are_those_of_two(
    client: Any, address: str, fields: dict[str, Any], binary: bool, clip: bool
) -> None:
    fields = {"class": "bee", "n": 2} | fields
    answer = client.infer(
        "plain",
        tensors(COMMON | fields | {"class": ["bee"] * 2}),
        outputs=[triton.InferRequestedOutput(name, binary_data=binary) for name in ("values", "seed", "images")],
        parameters={"clip": clip},
    )
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["values", "seed", "images"]
    for name, dtype in (("values", "float32"), ("images", "uint8")):
        wanted = native(address, "plain", dtype=dtype, clip=clip, **fields)
        assert answer.as_numpy(name).dtype == wanted.dtype
        assert answer.as_numpy(name).tobytes() == wanted.tobytes()


def test_metadata_and_configuration_describe_arrays_and_samplers(client: Any, address: str) -> None:
    described = {name: client.get_model_metadata(name) for name in MODELS}
    shapes = {
        model: {tensor["name"]: tensor["shape"] for tensor in metadata["inputs"]}
        for model, metadata in described.items()
    }
    assert shapes["plain"] | {"cond": None} == shapes["maps"] | {"cond": None}
    assert shapes["plain"]["image"] == shapes["plain"]["latent"] == [-1, 8, 8, 1]
    assert (shapes["plain"]["mask"], shapes["plain"]["resample"]) == ([-1, 8, 8], [2])
    assert "cond" not in shapes["plain"]
    assert (shapes["maps"]["cond"], shapes["upsampler"]["cond"]) == ([-1, 8, 8, 2], [-1, 4, 4, 1])
    listed = httpx.get(f"http://{address}/v1/models").json()["samplers"]
    assert described["plain"]["samplers"] == listed
    config = client.get_model_config("maps")
    assert json.loads(config["parameters"]["samplers"]["string_value"]) == listed
    cond = next(tensor for tensor in config["input"] if tensor["name"] == "cond")
    assert cond == {"name": "cond", "data_type": "TYPE_UINT8", "dims": [-1, 8, 8, 2], "optional": False}


def test_every_option_of_given_images_is_an_input() -> None:
    assert set(GivenOptions.model_fields) <= {*INPUTS, *ARRAYS}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": PIXELS}, "image: needs `strength`, `start_timestep` or `mask`"),
        ({"mask": MASK}, "mask: is valid only with `image`"),
        ({"image": PIXELS[:7], "strength": 1}, r"image: must have shape \[8, 8, 1\] .* got \[7, 8, 1\]"),
        ({"image": np.zeros((65, 8, 8, 1), np.uint8), "strength": 1}, "image: must hold at most 64 arrays; got 65"),
        ({"image": np.full((8, 8, 1), np.nan, np.float32), "strength": 1}, "image: must hold finite numbers"),
        ({"image": PIXELS, "mask": np.full((8, 8), 2, np.float32)}, r"mask: must hold values in 0\.\.1"),
        ({"image": PIXELS, "mask": MASK, "resample": [2]}, r"resample: shape must be \[2\]; got \[1\]"),
        (
            {"image": PIXELS, "mask": MASK, "resample": [0, 2]},
            r"resample\.times: input should be greater than or equal to 1",
        ),
        ({"image": PIXELS, "strength": 2}, "strength: input should be less than or equal to 1"),
        ({"latent": PIXELS}, 'latent: datatype must be FP32; got "UINT8"'),
        ({"latent": np.full((8, 8, 1), 1e6, np.float32)}, "latent: must hold values of at most 1000"),
        ({"image": np.full((8, 8, 1), np.inf, np.float32), "strength": 1}, "image: must hold finite numbers"),
        ({"cond": SMALL}, "cond: must be absent: the model takes no conditioning image"),
    ],
)
def test_wrong_arrays_are_refused_by_name(client: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as error:
        client.infer("plain", tensors(fields))
    assert error.value.status() == "400"
