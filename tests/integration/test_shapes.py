"""Networks of any shape and number of channels, conditioned or not: trained, exported, served, in the data's units."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app as commands
from formats.artifact import read_artifact
from formats.checkpoint_config import read_config
from model_export import parity
from service.http.app import create_app
from service.settings import Settings
from tests.counts import LONG
from tests.integration.in_process import client_of
from tests.integration.test_given_images import npy
from tests.waiting import run_async

SETTINGS = (
    "class_conditional=false", "label_dropout=0", "model.model_channels=32", "model.channel_mult=1,1",
    "total_images=16", "batch_size=8", "preview_per_class=1", "preview_steps=2", "diffusion.num_timesteps=20",
    "precision=float32", "data.value_range=-3,5",
)  # fmt: skip


def run(*arguments: object) -> str:
    result = CliRunner().invoke(commands, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def ask(
    folder: Path, backend: str, conditions: dict[str, str]
) -> tuple[dict[str, Any], bytes, bytes, httpx.Response, dict[str, Any]]:
    settings = Settings.model_validate(
        {"models": (folder,), "backend": backend, "max_rows": 2, "threads": 1, "cache_dir": ""}
    )
    app = create_app(settings)

    async def requests() -> tuple[dict[str, Any], bytes, bytes, httpx.Response, dict[str, Any]]:
        async with client_of(app) as client:
            (model,) = (await client.get("/v1/models")).json()["models"]
            body = {"n": 2, "steps": 4, "seed": 3, **conditions}
            arrays = await client.post("/v1/generate", json=body, headers={"Accept": "application/x-npz"})
            assert arrays.status_code == 200, arrays.text
            floats = {**body, "format": "npy", "dtype": "float32"}
            values = await client.post("/v1/generate", json=floats, headers={"Accept": "application/x-npy"})
            assert values.status_code == 200, values.text
            picture = await client.post("/v1/generate", json={**body, "n": 1}, headers={"Accept": "image/png"})
            metadata = (await client.get(f"/v2/models/{model['name']}")).json()
            return model, arrays.content, values.content, picture, metadata

    return run_async(requests())


@pytest.mark.parametrize(
    ("height", "width", "channels", "cond_channels"),
    [(12, 20, 32, 1), *([(12, 20, 2, 0), (16, 8, 4, 0)] if LONG else [])],
)
def test_a_network_of_any_shape_is_trained_exported_and_served(
    height: int, width: int, channels: int, cond_channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "STEPS", 5)
    monkeypatch.setattr(parity, "ROWS", 2)
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {"images": rng.uniform(-3, 5, (8, height, width, channels)).astype(np.float32)}
    if cond_channels:
        data["cond"] = rng.uniform(0, 9, (8, height, width, cond_channels)).astype(np.float32)
    np.savez(tmp_path / "data.npz", **data)
    chosen = [
        *SETTINGS, f"model.image_size={height},{width}", f"model.image_channels={channels}",
        f"model.attention_resolutions={height // 2}", f"model.cond_channels={cond_channels}",
        *(["data.cond_range=0,9"] if cond_channels else []),
    ]  # fmt: skip
    assignments = [part for setting in chosen for part in ("--set", setting)]
    run("train", "fashion32", "--data", tmp_path / "data.npz", "--out", tmp_path / "run", *assignments)
    folder = tmp_path / "run" / "model"

    config = read_config(folder)
    assert config.model.image_shape == (channels, height, width)
    assert config.kind == "unet"
    assert config.value_range == (-3, 5)
    assert list((tmp_path / "run" / "samples").glob("*.png"))

    run("export", folder, folder / "artifact")
    manifest = read_artifact(folder / "artifact")
    assert manifest.inputs == ("x_t", "emb_t", *(["cond"] if cond_channels else []))
    assert {p.backend.split(" ")[0] for p in manifest.parity} == {"onnxruntime", "openvino"}
    assert all(p.limit is None or p.worst < p.limit for p in manifest.parity)

    conditions = {"cond": npy(data["cond"][0])} if cond_channels else {}
    model, arrays, floats, picture, metadata = ask(folder / "artifact", "openvino", conditions)
    assert model["image_size"] == [height, width]
    assert (model["image_channels"], model["value_range"]) == (channels, [-3, 5])
    with np.load(io.BytesIO(arrays)) as archive:
        images = archive["arr_0"]
    assert (images.shape, images.dtype) == ((2, height, width, channels), np.uint8)
    values = np.load(io.BytesIO(floats))
    assert (values.shape, values.dtype) == (images.shape, np.float32)
    np.testing.assert_allclose((values + 3) / 8 * 255, images, atol=1.001)  # pixels are truncated
    assert len(np.unique(values[..., -1])) > height  # no channel is constant
    assert metadata["outputs"][0]["shape"] == [-1, height, width, channels]
    if channels == 4:
        assert picture.headers["content-type"] == "image/png"
    else:
        assert picture.status_code == 422
        assert (
            picture.json()["detail"] == f'format: must be "npz" or "npy" for images of {channels} channels; got "png"'
        )
