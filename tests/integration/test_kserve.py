"""The Open Inference Protocol, as used by Triton's own client and by malicious clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from service.http.kserve.routes import ARRAYS, INPUTS
from service.http.kserve.schemas import InferParameters
from service.requests.generate_request import SamplingOptions, UpsampleOptions
from tests.integration.exact_service import MODEL, exact_app, expected, serving
from tests.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(exact_app()) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address, connection_timeout=PATIENCE_S, network_timeout=PATIENCE_S) as client:
        yield client


def tensor(name: str, *values: object, binary: bool = True) -> Any:
    dtype = {"BYTES": np.object_, "INT64": np.int64, "FP32": np.float32}[INPUTS[name]]
    array: npt.NDArray[Any] = np.array(values, dtype=dtype)
    return triton.InferInput(name, list(array.shape), INPUTS[name]).set_data_from_numpy(array, binary_data=binary)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_the_requested_pixels(client: Any, binary: bool) -> None:
    inputs = [
        tensor("class", "cat", b"T_SHIRT/top", binary=binary),
        tensor("steps", 5, binary=binary),
        tensor("seed", 2**53 - 1, binary=binary),
        tensor("sampler", "ddim", binary=binary),
        tensor("eta", 0.3, binary=binary),
    ]
    outputs = None if binary else [triton.InferRequestedOutput(n, binary_data=False) for n in ("seed", "images")]
    answer = client.infer(MODEL, inputs, outputs=outputs, request_id="mine", priority=2, timeout=600_000_000)
    images = answer.as_numpy("images")
    assert (images.shape, images.dtype) == ((2, 8, 8, 1), np.uint8)
    for index, class_index in enumerate([2, 3]):
        wanted = expected(2**53 - 1, index, class_index, steps=5, sampler="ddim", eta=0.3)
        assert images[index].tobytes() == wanted.tobytes()
    assert answer.as_numpy("seed").tolist() == [2**53 - 1] * 2
    assert answer.get_response()["id"] == "mine"
    if binary:
        assert answer.as_numpy("class_index").tolist() == [2, 3]
        assert answer.as_numpy("image_index").tolist() == [0, 1]
    else:
        assert [output["name"] for output in answer.get_response()["outputs"]] == ["seed", "images"]


def test_a_request_without_inputs_gets_one_image_of_a_class_drawn_from_its_seed(client: Any) -> None:
    answer = client.infer(MODEL, [])
    (class_index,), (seed,) = answer.as_numpy("class_index"), answer.as_numpy("seed")
    assert answer.as_numpy("images")[0].tobytes() == expected(seed, 0, class_index, steps=100).tobytes()


def test_outputs_may_be_mixed_and_classes_may_be_indices(client: Any) -> None:
    outputs = [triton.InferRequestedOutput("images"), triton.InferRequestedOutput("seed", binary_data=False)]
    answer = client.infer(MODEL, [tensor("class_index", 1, 0), tensor("seed", 4), tensor("steps", 3)], outputs=outputs)
    assert answer.get_output("seed")["data"] == [4, 4]
    assert answer.as_numpy("images")[1].tobytes() == expected(4, 1, 0, steps=3).tobytes()


def test_the_asyncio_client_does_the_same(address: str) -> None:
    async def ask() -> list[Any]:
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready(MODEL)
            asked = (
                client.infer(MODEL, [tensor("class", "bee"), tensor("seed", seed), tensor("steps", 4)])
                for seed in range(6)
            )
            return await asyncio.gather(*asked)

    for seed, answer in enumerate(asyncio.run(ask())):
        assert answer.as_numpy("images")[0].tobytes() == expected(seed, 0, 1, steps=4).tobytes()


def test_health_metadata_and_configuration(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata(MODEL)
    always = {name: datatype for name, datatype in INPUTS.items() if not name.startswith("upsample.")}
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]} == always | {
        name: datatypes[0] for name, datatypes in ARRAYS.items() if name != "cond"
    }
    assert {"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 1]} in metadata["outputs"]
    assert {"name": "values", "datatype": "FP32", "shape": [-1, 8, 8, 1]} in metadata["outputs"]
    config = client.get_model_config(MODEL)
    assert {"name": "class", "data_type": "TYPE_STRING", "dims": [-1], "optional": True} in config["input"]
    assert config["max_batch_size"] == 0


def test_a_models_version_is_its_numerics_id(client: Any) -> None:
    (version,) = client.get_model_metadata(MODEL)["versions"]
    assert client.is_model_ready(MODEL, version)
    assert client.infer(MODEL, [tensor("steps", 2)], version).get_response()["model_version"] == version
    with pytest.raises(InferenceServerException, match=f"must be one of {MODEL}, version {version}; got") as error:
        client.infer(MODEL, [tensor("steps", 2)], "1")
    assert error.value.status() == "404"


def test_statistics_count_images_and_network_calls(client: Any) -> None:
    (before,) = client.get_inference_statistics(MODEL)["model_stats"]
    client.infer(MODEL, [tensor("n", 3), tensor("steps", 4), tensor("cfg_scale", 1)])
    (after,) = client.get_inference_statistics()["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 3
    assert 4 <= after["execution_count"] - before["execution_count"] <= 12
    assert sum(batch["compute_infer"]["count"] for batch in after["batch_stats"]) == after["execution_count"]
    stats = after["inference_stats"]
    assert stats["success"]["ns"] == stats["queue"]["ns"] + stats["compute_infer"]["ns"]
    assert stats["fail"]["count"] == 0
    assert after["last_inference"] > before["last_inference"]


def test_every_option_of_a_native_request_can_be_given_as_a_tensor_or_a_parameter() -> None:
    parameters = {"priority": "priority", "deadline_s": "timeout", "model": None}
    for name in SamplingOptions.model_fields:
        assert name in INPUTS or name in parameters or name == "upsample"
    assert {f"upsample.{name}" for name in UpsampleOptions.model_fields} < set(INPUTS)
    assert set(filter(None, parameters.values())) < set(InferParameters.model_fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([tensor("class", "dog")], 'class: must be one of Ape, Bee, Cat, T-shirt/top; got "dog"'),
        ([tensor("class_index", 4)], "class: index must be 0..3; got 4"),
        ([tensor("class", "cat"), tensor("class_index", 1)], "give either `class` or `class_index`, not both"),
        ([tensor("class", "cat"), tensor("n", 2)], "n: must be 1"),
        ([tensor("steps", 1)], "steps: input should be greater than or equal to 2; got 1"),
        ([tensor("steps", 5, 6)], r"steps: shape must be \[1\]; got \[2\]"),
        ([tensor("cfg_scale", np.nan)], "cfg_scale: .* got NaN"),
        ([tensor("seed", -1)], "seed: input should be greater than or equal to 0"),
        ([triton.InferInput("steps", [1], "INT32").set_data_from_numpy(np.ones(1, np.int32))], "must be INT64"),
        ([triton.InferInput("prompt", [1], "INT64").set_data_from_numpy(np.ones(1, int))], "must be among class, "),
        ([triton.InferInput("steps", [1], "INT64").set_shared_memory("region", 8)], r"inputs\.0\.parameters\.shared_"),
        ([tensor("class", b"\xff")], "class: strings must be UTF-8"),
    ],
)
def test_errors_name_the_wrong_input(client: Any, inputs: list[Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as error:
        client.infer(MODEL, inputs)
    assert error.value.status() == "400"


def test_unknown_models_outputs_and_parameters_are_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match='model: must be one of tiny; got "other"'):
        client.infer("other", [])
    with pytest.raises(InferenceServerException, match=r"parameters\.sequence_id"):
        client.infer(MODEL, [], sequence_id=1)
    with pytest.raises(InferenceServerException, match=r'outputs\.0\.name: must be "images", '):
        client.infer(MODEL, [], outputs=[triton.InferRequestedOutput("logits")])
    with pytest.raises(InferenceServerException, match=r"deadline_s: predicted to finish in .* a deadline of 1e-06 s"):
        client.infer(MODEL, [], timeout=1)


def frame(head: object, behind: bytes = b"", length: object = None) -> dict[str, Any]:
    content = head if isinstance(head, bytes) else json.dumps(head).encode()
    given = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length or len(content))}
    return {"content": content + behind, "headers": given}


def described(**tensor: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "seed", "shape": [1], "datatype": "INT64", **tensor}]}


@pytest.mark.parametrize(
    "sent",
    [
        frame({"inputs": []}, length=10**6),
        frame({"inputs": []}, length="-1"),
        frame({"inputs": []}, b"garbage"),
        frame({"inputs": []}, length=5),
        frame(described(parameters={"binary_data_size": 8}), b"short"),
        frame(described(parameters={"binary_data_size": 2**63}), b"12345678"),
        frame(described(parameters={"binary_data_size": -8}), b"12345678"),
        frame(described(shape=[2**62, 2**62], parameters={"binary_data_size": 8}), b"12345678"),
        frame(described(shape=[10**30], parameters={"binary_data_size": 8}), b"12345678"),
        frame(described(shape=[-1], data=[1])),
        frame(described(shape=[], data=[1])),
        frame(described(data=[[[1]]])),
        frame(described(data=[10**400])),
        frame(described(data=[1] * 20_000, shape=[20_000])),
        frame({"inputs": [{"name": "class", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 4}}]},
              b"\xff\xff\xff\x7f"),
        frame(b"[" * 30_000),
        frame(b'{"inputs":' * 3_000),
        frame(b'{"inputs": [], "id": "\xff"}'),
        frame(b"\x00" * 100),
        frame(b"null"),
        frame(b""),
        {"content": b"no header", "headers": {"Content-Type": "application/octet-stream"}},
    ],
    ids=range(22),
)  # fmt: skip
def test_frames_with_wrong_lengths_are_refused_before_any_work(address: str, client: Any, sent: dict[str, Any]) -> None:
    (before,) = client.get_inference_statistics(MODEL)["model_stats"]
    refused = httpx.post(f"http://{address}/v2/models/{MODEL}/infer", **sent, timeout=PATIENCE_S)
    assert (refused.status_code, list(refused.json())) == (400, ["error"])
    (after,) = client.get_inference_statistics(MODEL)["model_stats"]
    assert after["execution_count"] == before["execution_count"]


def test_equal_bytes_split_differently_are_another_request_for_an_idempotency_key(address: str) -> None:
    url = f"http://{address}/v2/models/{MODEL}/infer"
    first = frame(described(name="steps", data=[2]))
    first["headers"]["Idempotency-Key"] = "k"
    assert httpx.post(url, **first, timeout=PATIENCE_S).status_code == 200
    first["headers"]["Inference-Header-Content-Length"] = "9"
    again = httpx.post(url, **first, timeout=PATIENCE_S)
    assert (again.status_code, list(again.json())) == (400, ["error"])
    assert "was used for another request" in again.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Origin": "https://evil.example"}, 415),
        ({"Origin": "null"}, 415),
        ({"Sec-Fetch-Site": "cross-site"}, 415),
        ({"Content-Type": "application/json"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_another_origin_cannot_post(address: str, headers: dict[str, str], status: int) -> None:
    """A browser sends these without a preflight request; any other content type needs one, which is refused."""
    body = json.dumps({"inputs": [{"name": "steps", "shape": [1], "datatype": "INT64", "data": [2]}]}).encode()
    url = f"http://{address}/v2/models/{MODEL}/infer"
    assert httpx.post(url, content=body, headers=headers, timeout=PATIENCE_S).status_code == status
    asked = httpx.options(url, headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


def test_errors_outside_of_routes_have_the_form_of_the_protocol(address: str) -> None:
    for path, status in (("/v2/nowhere", 404), ("/v2/models/other", 404), (f"/v2/models/{MODEL}/infer", 405)):
        answer = httpx.get(f"http://{address}{path}", timeout=PATIENCE_S)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    evil = httpx.get(f"http://{address}/v2", headers={"Host": "evil.example"}, timeout=PATIENCE_S)
    assert (evil.status_code, list(evil.json())) == (421, ["error"])
