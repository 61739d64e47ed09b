"""Classifier guidance over HTTP: a model folder with a classifier, as a checkpoint and as artifacts without torch."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli.main import app as command_line
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from model_export.parity import PIXEL_LIMIT
from service.backends.base import BackendOptions
from service.backends.select import load_denoiser
from service.http.app import create_app
from service.settings import Settings
from tests.counts import LONG
from tests.denoisers import AsNetwork
from tests.exports import Exports
from tests.fakes import tiny_checkpoint, tiny_guided_checkpoint
from tests.integration.in_process import client_of
from tests.waiting import run_async

WIDTH = 2
ASKED = {"class": [1, 2], "steps": 4, "seed": 3, "cfg_scale": 1, "classifier_scale": 5}


def serve(folder: Path, backend: str, ask: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Serve a folder with the application, and call it."""
    settings = Settings.model_validate(
        {"models": (folder,), "backend": backend, "max_rows": WIDTH, "threads": 1, "cache_dir": "", "precision": "fp32"}
    )
    app = create_app(settings)

    async def talk() -> Any:
        async with client_of(app) as client:
            return await ask(client)

    return run_async(talk())


async def ask_for_pictures(client: httpx.AsyncClient) -> tuple[Any, Any, str]:
    answer, plain = await asyncio.gather(
        *(
            client.post("/v1/generate", json=body, headers={"Accept": "application/x-npz"})
            for body in (ASKED, {**ASKED, "classifier_scale": 0})
        )
    )
    assert (answer.status_code, plain.status_code) == (200, 200), answer.text
    (model,) = (await client.get("/v1/models")).json()["models"]
    assert model["classifier_guidance"] is True
    return pixels_of(answer.content), pixels_of(plain.content), (await client.get("/metrics")).text


def pixels_of(npz: bytes) -> Any:
    with np.load(io.BytesIO(npz), allow_pickle=False) as arrays:
        return arrays["arr_0"]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_the_service_gives_the_guided_pixels_of_the_one_image_sampler(exports: Exports, backend: str) -> None:
    folder = exports.guided()
    pixels, plain, metrics = serve(folder, backend, ask_for_pictures)
    assert 'iddpm_classified_rows_total{model="guided"} 8.0' in metrics

    options = BackendOptions(max_rows=WIDTH, threads=1, cache_dir="", precision="fp32", device="cpu")
    denoiser = load_denoiser(folder, backend, options)
    plan = build_plan(denoiser.config.diffusion, "ancestral", "4")
    for index, label in enumerate((1, 2)):
        for scale, picture in ((5.0, pixels[index]), (0.0, plain[index])):
            spec = ImageSpec(seed=3, image_index=index, class_index=label, classifier_scale=scale)
            xp = torch if backend == "torch" else np
            alone = sample_images(AsNetwork(denoiser), plan, [spec], gradient=denoiser.classifier, xp=xp)
            np.testing.assert_array_equal(picture, alone[0])
    assert not np.array_equal(pixels, plain)


@pytest.mark.skipif(not LONG, reason="exports a model and its classifier: IDDPM_TEST_LONG=1")
def test_an_exported_model_is_guided_like_its_checkpoint(exports: Exports) -> None:
    folder = exports.proven()
    expected = serve(folder, "torch", ask_for_pictures)[:2]
    for backend, served in (("openvino", folder), ("onnxruntime", folder), ("openvino", folder / "artifact")):
        pictures = serve(served, backend, ask_for_pictures)[:2]
        for actual, picture in zip(pictures, expected, strict=True):
            assert (np.abs(actual.astype(int) - picture) > 2).mean() <= PIXEL_LIMIT, backend


def test_guidance_that_a_model_lacks_is_refused_with_field_and_rule(tmp_path: Path) -> None:
    async def refusals(client: httpx.AsyncClient) -> list[Any]:
        bodies = [{"classifier_scale": 2.5}, {"classifier_scale": -1}, {"classifier_scale": 0, "steps": 2}]
        answers = [await client.post("/v1/generate", json=body) for body in bodies]
        (model,) = (await client.get("/v1/models")).json()["models"]
        return [[answer.status_code, answer.json().get("errors")] for answer in answers] + [model]

    without, negative, off, model = serve(tiny_checkpoint(tmp_path / "plain"), "torch", refusals)
    message = "must be 0: the model has no noisy classifier; got 2.5"
    assert without == [422, [{"field": "classifier_scale", "message": message}]]
    assert (negative[0], negative[1][0]["field"]) == (422, "classifier_scale")
    assert off[0] == 200
    assert model["classifier_guidance"] is False


def test_the_classes_of_an_unconditional_model_are_its_classifier_s(tmp_path: Path) -> None:
    async def ask(client: httpx.AsyncClient) -> list[Any]:
        guided = await client.post("/v1/generate", json={"class": "3", "steps": 2, "classifier_scale": 1})
        drawn = await client.post("/v1/generate", json={"steps": 2, "seed": 1, "classifier_scale": 1})
        plain = await client.post("/v1/generate", json={"steps": 2})
        wrong = await client.post("/v1/generate", json={"class": "3", "steps": 2})
        (model,) = (await client.get("/v1/models")).json()["models"]
        pictures = [answer.json()["images"][0] for answer in (guided, drawn, plain)]
        return [*([image["class"], image["class_index"]] for image in pictures), wrong.json(), model["classes"]]

    folder = tiny_guided_checkpoint(tmp_path / "guided", num_classes=None, null_class=False)
    guided, drawn, plain, wrong, classes = serve(folder, "torch", ask)
    assert (guided, plain, classes) == (["3", 3], [None, None], ["0", "1", "2", "3"])
    assert drawn[0] in classes
    assert wrong["errors"][0]["field"] == "class"
    assert "only its classifier has classes" in wrong["errors"][0]["message"]


def test_the_sample_command_supports_classifier_guidance(tmp_path: Path) -> None:
    folder = tiny_guided_checkpoint(tmp_path / "guided")
    pictures = []
    for scale in ("0", "20"):
        out = tmp_path / f"{scale}.npz"
        flags = ["--class", "bee", "--steps", "4", "--seed", "6", "--cfg-scale", "1", "--classifier-scale", scale]
        result = CliRunner().invoke(command_line, ["sample", "--model", str(folder), "--out", str(out), *flags])
        assert result.exit_code == 0, result.output
        pictures.append(pixels_of(out.read_bytes()))
    denoiser = load_denoiser(folder, "torch", BackendOptions(device="cpu"))
    plan = build_plan(denoiser.config.diffusion, "ancestral", "4")
    for classifier_scale, picture in zip((0.0, 20.0), pictures, strict=True):
        spec = ImageSpec(seed=6, class_index=1, classifier_scale=classifier_scale)
        np.testing.assert_array_equal(
            picture, sample_images(AsNetwork(denoiser), plan, [spec], gradient=denoiser.classifier)
        )
    assert not np.array_equal(*pictures)
