"""An upsampler of OpenAI, from its `.pt` file to pictures: imported by the command, and served."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from cli.main import app as commands
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from formats.checkpoint_config import read_config
from service.http.app import create_app
from service.settings import Settings
from tests import golden
from tests.integration.in_process import client_of
from tests.integration.test_given_images import npy
from tests.unit.interchange.test_import import FLAG_LINE, SUPERRES
from tests.waiting import run_async

CLASS, TIMESTEP = 3, 1500


def test_an_imported_upsampler_is_served(tmp_path: Path) -> None:
    arguments = [str(SUPERRES), "--out", str(tmp_path / "up"), "--repo", "improved", "--flags", FLAG_LINE]
    result = CliRunner().invoke(commands, ["import", *arguments])
    assert result.exit_code == 0, result.output

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (8, 8, 3), np.uint8)
    x_t = rng.standard_normal((16, 16, 3)).astype(np.float32)
    settings = Settings.model_validate(
        {"models": (tmp_path / "up",), "backend": "torch", "max_rows": 2, "threads": 1, "precision": "fp32"}
    )
    service = create_app(settings)

    async def ask() -> tuple[httpx.Response, httpx.Response, dict[str, Any]]:
        async with client_of(service) as client:
            common = {"class": CLASS, "cond": npy(small)}
            raw = await client.post("/v1/denoise", json={**common, "x_t": npy(x_t), "timestep": TIMESTEP})
            body = {**common, "steps": 4, "seed": 7, "format": "npy"}
            image = await client.post("/v1/generate", json=body, headers={"Accept": "application/x-npy"})
            (model,) = (await client.get("/v1/models")).json()["models"]
            return raw, image, model

    raw, image, model = run_async(ask())
    assert (model["cond"]["height"], model["cond"]["low_resolution"]) == (8, True)

    network, wanted = golden.network("imp_superres"), torch.tensor([CLASS])
    low_res = torch.from_numpy(small).permute(2, 0, 1)[None] / 127.5 - 1
    enlarged = F.interpolate(low_res, (16, 16), mode="bilinear")  # as OpenAI's SuperResModel does
    assert raw.status_code == 200, raw.text
    with np.load(io.BytesIO(raw.content)) as arrays:
        eps = arrays["eps"][0]
    x = torch.from_numpy(x_t).permute(2, 0, 1)[None]
    by_hand = network(x, torch.tensor([float(TIMESTEP)]), wanted, enlarged)[0, :3].permute(1, 2, 0)
    np.testing.assert_allclose(eps, by_hand.numpy(), atol=2e-4)

    assert image.status_code == 200, image.text
    spec = ImageSpec(seed=7, image_index=0, class_index=CLASS, cond=enlarged[0].numpy())
    plan = build_plan(read_config(tmp_path / "up").diffusion, "ancestral", "4")
    expected = sample_images(network, plan, [spec])
    made = np.load(io.BytesIO(image.content))
    assert made.shape == (1, 16, 16, 3)
    assert np.abs(made.astype(int) - expected).max() <= 1  # enlarging in another order of sums
