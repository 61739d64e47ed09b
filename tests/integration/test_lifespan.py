"""The lifespan of an app may be entered again: it serves the same models, with the same pixels."""

from __future__ import annotations

import asyncio
import io

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from tests.integration.exact_service import MODEL, exact_app, expected
from tests.waiting import runs

BODY = {"class": 1, "steps": 5, "seed": 7}


async def served(app: FastAPI) -> tuple[bytes, int]:
    """Generate an image within one lifespan of the app; return it and the number of images in KServe's statistics."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        while (await http.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        models = (await http.get("/v1/models")).json()["models"]
        assert [model["name"] for model in models] == [MODEL]
        answer = await http.post("/v1/generate", json=BODY, headers={"Accept": "image/png"})
        assert answer.status_code == 200, answer.text
        stats = (await http.get(f"/v2/models/{MODEL}/stats")).json()["model_stats"][0]
        return answer.content, stats["inference_count"]


@runs
async def test_a_second_lifespan_serves_the_same_models() -> None:
    app = exact_app()
    first, counted = await served(app)
    second, counted_then = await served(app)
    assert first == second
    assert (counted, counted_then) == (1, 2)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(second))), expected(7, 0, 1, steps=5)[:, :, 0])


@runs
async def test_a_lifespan_within_another_is_refused() -> None:
    app = exact_app()
    async with app.router.lifespan_context(app):
        with pytest.raises(RuntimeError, match="the app has no models: it is running already"):
            await served(app)
