"""The page's files and their policy, and its thumbnails, which are made once and for visitors of the page only."""

from __future__ import annotations

import asyncio
import io
import re

import httpx
import numpy as np
import pytest
from PIL import Image

from formats.images import shrink
from service.http.page import thumbnails
from service.http.page.routes import FOLDER
from service.http.page.thumbnails import CLIENT, LONGEST_SIDE, SEED, STEPS
from tests.integration.in_process import PausedDenoiser, Service, running
from tests.waiting import eventually, runs

OURS = {"X-Requested-With": "test"}


async def thumbnail(service: Service, class_index: object, model: str = "m") -> httpx.Response:
    return await service.ask("GET", f"/v1/models/{model}/thumbnails/{class_index}", headers=OURS)


@runs
async def test_the_page_and_its_files_are_served_with_a_strict_policy() -> None:
    async with running() as service:
        index = await service.ask("GET", "/")
        assert index.headers["content-type"].startswith("text/html")
        linked = re.findall(r'(?:src|href)="([^"#]+)"', index.text)
        modules = {
            name
            for path in FOLDER.glob("*.js")
            for name in re.findall(r'from "\./(.+?)"', path.read_text(encoding="utf-8"))
        }
        assert {"page/main.js", "page/style.css"} <= set(linked)
        for path in ["", *linked, *(f"page/{name}" for name in modules)]:
            answer = await service.ask("GET", f"/{path}")
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            assert "http" not in policy
            again = await service.ask("GET", f"/{path}", headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304, path
        assert (await service.ask("GET", "/page/../page.py")).status_code == 404
        assert (await service.ask("GET", "/page/%2e%2e/page.py")).status_code == 404


@runs
async def test_a_thumbnail_is_made_once_at_batch_priority_for_all_readers() -> None:
    async with running() as service:
        answers = await asyncio.gather(*(thumbnail(service, 2) for _ in range(3)))
        assert await service.metric("iddpm_image_queue_seconds_count") == 1
        assert {answer.content for answer in answers} == {(await thumbnail(service, 2)).content}
        pixels = np.asarray(Image.open(io.BytesIO(answers[0].content)))
        body = {"class": 2, "steps": STEPS, "seed": SEED}
        wanted = (await service.ask("POST", "/v1/generate", json=body, headers={"Accept": "image/png"})).content
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(wanted))))


@runs
async def test_a_thumbnail_whose_first_reader_leaves_is_made_for_the_next() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        first = asyncio.ensure_future(thumbnail(service, 1))
        second = asyncio.ensure_future(thumbnail(service, 1))
        service.denoiser.let_steps(3)
        await eventually(lambda: service.metric("iddpm_row_steps_total"))
        first.cancel()
        service.denoiser.let.set()
        assert (await second).status_code == 200
        assert await service.metric("iddpm_image_queue_seconds_count") == 1


@runs
async def test_a_thumbnail_that_could_not_be_made_is_tried_again() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        filling = asyncio.ensure_future(service.generate(n=3, steps=2))  # six rows; the queue has room for seven
        await service.until_accepted(1)
        refused = await thumbnail(service, 0)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        service.denoiser.let.set()
        await filling
        assert (await thumbnail(service, 0)).status_code == 200


def test_thumbnails_of_all_classes_do_not_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "AT_ONCE", 2)

    @runs
    async def check() -> None:
        async with running() as service:
            service.denoiser.let.clear()
            looking = [asyncio.ensure_future(thumbnail(service, index)) for index in range(4)]
            await service.until_accepted(2)
            generating = asyncio.ensure_future(service.generate(n=3, steps=2, cfg_scale=1))
            await service.until_accepted(3)
            assert service.app.state.service.engine.ledger.client(CLIENT).images == 2
            service.denoiser.let.set()
            answers = await asyncio.gather(generating, *looking)
            assert {answer.status_code for answer in answers} == {200}

    check()


@runs
async def test_thumbnails_are_made_for_the_own_page_and_existing_classes_only() -> None:
    async with running() as service:
        foreign = await service.ask("GET", "/v1/models/m/thumbnails/0")  # like an <img> of another origin
        assert foreign.status_code == 403
        assert [(await thumbnail(service, index)).status_code for index in (4, -1)] == [404, 404]
        assert (await thumbnail(service, "x")).status_code == 422
        assert (await thumbnail(service, 0, model="other")).status_code == 404
        assert await service.metric("iddpm_image_queue_seconds_count") == 0
    unconditional = PausedDenoiser()
    unconditional.config = unconditional.config.model_copy(
        update={
            "model": unconditional.config.model.replace(num_classes=None, null_class=False),
            "class_names": None,
        }
    )
    async with running(unconditional) as service:
        assert (await thumbnail(service, 0)).status_code == 404


@pytest.mark.parametrize(("side", "small"), [(64, 64), (65, 32), (256, 64), (100, 50)])
def test_thumbnails_of_large_pictures_are_averages_of_whole_blocks(side: int, small: int) -> None:
    ramp = np.arange(side * side * 3, dtype=np.float64).reshape(side, side, 3) % 251
    pixels = ramp.astype(np.uint8)
    shrunk = shrink(pixels, LONGEST_SIDE)
    assert shrunk.shape == (small, small, 3)
    factor = side // small
    assert shrunk[1, 2, 0] == np.rint(ramp[factor : 2 * factor, 2 * factor : 3 * factor, 0].mean())
