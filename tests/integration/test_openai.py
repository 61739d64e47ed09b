"""OpenAI's Images interface, used through OpenAI's own SDK."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
from PIL import Image

from diffusion.network_inputs import NetworkInputs
from tests.denoisers import ExactDenoiser
from tests.fakes import tiny_config
from tests.integration.exact_service import MODEL, exact_app, expected, serving
from tests.waiting import PATIENCE_S, until


class GatedDenoiser(ExactDenoiser):
    """A network that can be gated: it then waits before every call. Its output overflows for one class."""

    OVERFLOWS = 3

    def __init__(self) -> None:
        super().__init__(tiny_config())
        self.gated = False
        self.started = False
        self.allowed = threading.Semaphore(0)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        if self.gated:
            assert self.allowed.acquire(timeout=PATIENCE_S)
        out = super().__call__(inputs)
        if self.started:
            out[np.asarray(inputs.y) == self.OVERFLOWS] = np.nan
        return out

    def close(self) -> None:
        self.allowed = threading.Semaphore(0)  # drops permits left by an earlier test
        self.gated = True

    def open(self) -> None:
        self.gated = False
        self.allowed.release(10_000)


@pytest.fixture(scope="module")
def denoiser() -> GatedDenoiser:
    return GatedDenoiser()


@pytest.fixture(scope="module")
def address(denoiser: GatedDenoiser) -> Iterator[str]:
    with serving(exact_app(denoiser, max_queue=8)) as address:
        denoiser.started = True
        yield address


def sdk(address: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=PATIENCE_S, **options)


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with sdk(address, max_retries=0) as client:
        yield client


def pixels(b64_json: str | None) -> npt.NDArray[np.uint8]:
    assert b64_json is not None
    picture = Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("L")  # WebP has no grey mode
    return np.asarray(picture)[..., None]


def test_the_sdk_gets_the_requested_pixels(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model=MODEL,
        prompt="CAT, bee",
        n=4,
        size="8x8",
        response_format="b64_json",
        output_format="webp",
        quality="auto",
        user="somebody",
        extra_body={"steps": 5, "seed": 7, "sampler": "ddim", "eta": 0.3, "cfg_scale": 2, "priority": "batch"},
    )
    assert answer.data is not None
    assert (answer.size, answer.output_format, answer.background) == ("8x8", "webp", "opaque")
    assert abs(answer.created - time.time()) < 3600
    for index, (image, class_index) in enumerate(zip(answer.data, [2, 1, 2, 1], strict=True)):
        wanted = expected(7, index, class_index, steps=5, cfg_scale=2, sampler="ddim", eta=0.3)
        assert pixels(image.b64_json).tobytes() == wanted.tobytes()
        assert image.model_extra is not None
        assert image.model_extra["class"] == ["Ape", "Bee", "Cat"][class_index]
        assert (image.model_extra["seed"], image.model_extra["image_index"]) == (7, index)
    assert answer.model_extra is not None
    assert answer.model_extra["numerics_id"]


def test_a_prompt_alone_is_enough_and_an_empty_one_draws_the_class(client: openai.OpenAI) -> None:
    for prompt, classes in (("bee", {1}), ("", {0, 1, 2})):
        (image,) = client.images.generate(prompt=prompt, size="auto", extra_body={"seed": 1}).data or []
        assert image.model_extra is not None
        assert image.model_extra["class_index"] in classes
        assert image.model_extra["steps"] == 100


def test_jpeg_has_a_quality(client: openai.OpenAI) -> None:
    sizes = []
    for quality in (5, 100):
        answer = client.images.generate(
            prompt="bee", output_format="jpeg", output_compression=quality, extra_body={"seed": 1, "steps": 2}
        )
        sizes.append(len((answer.data or [])[0].b64_json or ""))
    assert sizes[0] < sizes[1]


def test_the_asynchronous_sdk_does_the_same(address: str) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=PATIENCE_S) as client:
            return await asyncio.gather(
                *(client.images.generate(prompt="ape", extra_body={"steps": 4, "seed": seed}) for seed in range(4))
            )

    for seed, answer in enumerate(asyncio.run(ask())):
        assert pixels(answer.data[0].b64_json).tobytes() == expected(seed, 0, 0, steps=4).tobytes()


def test_a_stream_has_partial_images_and_ends_with_the_final_ones(
    client: openai.OpenAI, denoiser: GatedDenoiser
) -> None:
    denoiser.close()
    stream = client.images.generate(
        prompt="cat", n=2, stream=True, partial_images=3, extra_body={"steps": 8, "seed": 5, "cfg_scale": 1}
    )
    with stream:
        for index in range(3):
            denoiser.allowed.release(2)
            for position, event in enumerate(next(stream) for _ in range(2)):
                assert event.type == "image_generation.partial_image"
                assert (event.partial_image_index, event.size, event.output_format) == (index, "8x8", "png")
                assert event.model_extra is not None
                assert (event.model_extra["position"], event.model_extra["step"]) == (position, 2 * index + 2)
                assert pixels(event.b64_json).shape == (8, 8, 1)
        denoiser.open()
        last = list(stream)
    assert len(last) == 2
    for event in last:
        assert event.type == "image_generation.completed"
        assert event.usage.total_tokens == 0
        assert event.model_extra is not None
        wanted = expected(5, event.model_extra["position"], 2, steps=8, cfg_scale=1)
        assert pixels(event.b64_json).tobytes() == wanted.tobytes()


def test_the_asynchronous_sdk_streams(address: str) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=PATIENCE_S) as client:
            stream = await client.images.generate(
                prompt="ape", stream=True, partial_images=1, extra_body={"steps": 4, "seed": 2}
            )
            return [event async for event in stream]

    *partial, completed = asyncio.run(ask())
    assert {event.type for event in partial} <= {"image_generation.partial_image"}
    assert pixels(completed.b64_json).tobytes() == expected(2, 0, 0, steps=4).tobytes()


def test_an_image_that_fails_ends_the_stream_with_an_error(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="t-shirt/top", stream=True, extra_body={"steps": 3})
    with pytest.raises(openai.APIError, match="image 0: its numbers overflowed") as error:
        list(stream)
    assert (error.value.type, error.value.code) == ("server_error", "image_failed")


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"prompt": "dog"}, "prompt", 'must be one of Ape, Bee, Cat, T-shirt/top; got "dog"'),
        ({"prompt": "cat, dog"}, "prompt", 'got "dog"'),
        ({"prompt": "cat, bee", "n": 3}, "n", "must be a multiple of 2"),
        ({"prompt": "cat", "n": 65}, "n", "less than or equal to 64"),
        ({"prompt": "cat", "size": "1024x1024"}, "size", 'must be 8x8 or auto; got "1024x1024"'),
        ({"prompt": "cat", "response_format": "url"}, "response_format", 'must be "b64_json"; got "url"'),
        ({"prompt": "cat", "output_format": "gif"}, "output_format", 'must be "png", "webp" or "jpeg"'),
        ({"prompt": "cat", "background": "transparent"}, "background", 'must be "auto" or "opaque"'),
        ({"prompt": "cat", "style": "anime"}, "style", 'must be "vivid" or "natural"; got "anime"'),
        ({"prompt": "cat", "quality": "hd"}, "quality", 'must be "auto" or "standard"; got "hd"'),
        ({"prompt": "cat", "extra_body": {"complexity": "low"}}, "complexity", "unknown field; allowed: model, "),
        ({"prompt": "cat", "partial_images": 1}, "partial_images", "is valid only with `stream`"),
        ({"prompt": "cat", "stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"prompt": "cat", "extra_body": {"steps": 1}}, "steps", "greater than or equal to 2"),
        ({"prompt": "cat", "extra_body": {"steps": 5, "respacing": "5"}}, "respacing", "not both"),
        ({"prompt": "cat", "extra_body": {"guidance": 2}}, "guidance", "allowed: model, steps, "),
        ({"prompt": "cat", "extra_body": {"deadline_s": 1e-9}}, None, "predicted to finish in"),
    ],
)
def test_an_invalid_parameter_is_a_bad_request_that_names_it(
    client: openai.OpenAI, asked: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**asked)
    assert message in error.value.message
    assert (error.value.param, error.value.type) == (param, "invalid_request_error")
    assert error.value.response.headers["x-should-retry"] == "false"
    assert error.value.request_id


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": None},  # LiteLLM's test request for a model
        {
            "prompt": "cat",
            "n": 1,
            "size": "auto",
            "response_format": "b64_json",
            "style": "vivid",
            "quality": "standard",
        },
        {"prompt": "cat", "n": 1, "size": "8x8", "response_format": "b64_json"},  # Open WebUI, Vercel's AI SDK
        {"prompt": "cat", "n": 1, "size": "8x8", "style": "natural", "quality": "standard"},  # LibreChat's dalle
        {"prompt": "cat", "n": 1, "background": "auto", "quality": "auto", "size": "auto", "output_format": "png"},
        {"prompt": "cat", "moderation": "auto", "user": "u", "safety_identifier": "s", "output_compression": 100},
        {"prompt": "cat", **dict.fromkeys(["n", "size", "quality", "style", "background", "user", "output_format"])},
    ],
    ids=["litellm", "langchain.js", "open-webui", "librechat-dalle", "librechat-gpt-image", "unused", "null"],
)
def test_parameters_of_popular_clients_are_accepted_when_they_change_nothing(
    address: str, body: dict[str, Any]
) -> None:
    url = f"http://{address}/v1/images/generations"
    answer = httpx.post(url, json={"model": MODEL, "steps": 2, "seed": 1, **body}, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1


def test_the_sdk_does_not_retry_an_image_that_fails(address: str) -> None:
    with sdk(address, max_retries=2) as client, pytest.raises(openai.InternalServerError) as error:
        client.images.generate(prompt="t-shirt/top", extra_body={"steps": 3})
    assert error.value.code == "image_failed"
    assert error.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_the_sdk_retries_when_the_queue_was_full(address: str, denoiser: GatedDenoiser) -> None:
    def refused() -> int:
        metrics = httpx.get(f"http://{address}/metrics", timeout=PATIENCE_S).text
        return int(float(metrics.split('iddpm_requests_total{outcome="rejected"} ')[1].split()[0]))

    before = refused()
    denoiser.close()
    with ThreadPoolExecutor(2) as pool, sdk(address, max_retries=5) as client:
        try:
            extra = {"steps": 2, "seed": 1, "cfg_scale": 1}
            both = [pool.submit(lambda: client.images.generate(prompt="cat", n=16, extra_body=extra)) for _ in range(2)]
            until(lambda: refused() > before)
        finally:
            denoiser.open()
        answers = [future.result().data or [] for future in both]
    assert [image.b64_json for image in answers[0]] == [image.b64_json for image in answers[1]]


def test_models_are_listed_as_the_sdk_expects(client: openai.OpenAI, address: str) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "iddpm")
    assert client.models.retrieve(MODEL) == model
    assert httpx.get(f"http://{address}/v1/models", timeout=PATIENCE_S).json()["models"][0]["name"] == MODEL
    with pytest.raises(openai.NotFoundError, match='model: must be one of tiny; got "gpt-image-2"'):
        client.models.retrieve("gpt-image-2")
    with pytest.raises(openai.NotFoundError, match='model: must be one of tiny; got "gpt-image-2"'):
        client.images.generate(prompt="cat", model="gpt-image-2")


def test_errors_outside_of_routes_have_the_form_of_openai(address: str) -> None:
    url = f"http://{address}/v1/images/generations"
    for answer, status in (
        (httpx.get(url, timeout=PATIENCE_S), 405),
        (httpx.post(url, content="{}", headers={"Content-Type": "text/plain"}, timeout=PATIENCE_S), 415),
        (httpx.post(url, json={}, headers={"Host": "evil.example"}, timeout=PATIENCE_S), 421),
        (httpx.post(url, content=b"{", headers={"Content-Type": "application/json"}, timeout=PATIENCE_S), 400),
        (httpx.post(url, json={"n": 0}, timeout=PATIENCE_S), 400),
        (httpx.post(f"http://{address}/v1/images/edits", json={}, timeout=PATIENCE_S), 415),
        (httpx.post(f"http://{address}/v1/images/variations", json={}, timeout=PATIENCE_S), 404),
    ):
        assert (answer.status_code, set(answer.json())) == (status, {"error"})
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
