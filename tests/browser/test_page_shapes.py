"""Models whose images are RGB, not square, or no pictures at all, on the page: results, painting and comparison."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Page, expect

from service.http.page.thumbnails import Thumbnails
from tests.browser.conftest import Site, serving
from tests.browser.test_page import NewContext, answered, assert_accessible
from tests.browser.test_page_given import Pixels, asked_with, mask_in, png
from tests.browser.test_page_stages import chosen, npy, of
from tests.fakes import CLASS_NAMES

WIDE, TALL, MANY = "m0", "m1", "m2"
SHAPES = {WIDE: (8, 16, 3), TALL: (32, 8, 2), MANY: (8, 8, 5)}
"""Height, width and channels."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    models = [of(image_size=shape[:2], image_channels=shape[2], attention_resolutions=()) for shape in SHAPES.values()]
    with serving(*models) as site:
        yield site


def given(model: str) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, SHAPES[model], np.uint8)


def file_of(pixels: Pixels) -> FilePayload:
    is_picture = pixels.shape[2] == 3
    name, content = ("p.png", png(pixels)) if is_picture else ("p.npy", npy(pixels))
    return {"name": name, "mimeType": "", "buffer": content}


def pixels_of(content: bytes) -> Pixels:
    """Return the pixels of an image that the service sent, [height, width, channels]."""
    file = io.BytesIO(content)
    pixels: Pixels = np.load(file)[0] if content.startswith(b"\x93NUMPY") else np.asarray(Image.open(file))
    return pixels


def beside_each_other(pixels: Pixels) -> Pixels:
    """Arrange the channels of an array as the page does, two rows of them at most here."""
    channels = pixels.shape[2]
    columns = int(np.ceil(np.sqrt(channels)))
    rows = -(-channels // columns)
    tiles = np.zeros((rows * columns, *pixels.shape[:2]), np.uint8)
    tiles[:channels] = np.moveaxis(pixels, 2, 0)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in np.split(tiles, rows)])


def drawn(page: Page, selector: str) -> Pixels:
    """Return the colours of an image element or canvas of the page."""
    data = page.locator(selector).evaluate(
        """(shown) => {
            const [width, height] = [shown.naturalWidth ?? shown.width, shown.naturalHeight ?? shown.height];
            const context = new OffscreenCanvas(width, height).getContext("2d");
            context.drawImage(shown, 0, 0);
            return [height, width, ...context.getImageData(0, 0, width, height).data];
        }"""
    )
    return np.array(data[2:], np.uint8).reshape(*data[:2], 4)[..., :3]


def as_shown(pixels: Pixels) -> Pixels:
    if pixels.shape[2] == 3:
        return pixels
    return np.repeat(beside_each_other(pixels)[..., None], 3, axis=2)


@pytest.mark.parametrize("model", SHAPES)
def test_a_picture_is_painted_on_and_compared(page: Page, site: Site, model: str) -> None:
    chosen(page, site, model)
    before = given(model)
    height, width, channels = before.shape
    page.get_by_label("Choose a picture").set_input_files(file_of(before))
    editor = page.get_by_role("application", name="Mask of the picture")
    expect(editor).to_be_visible()
    one = np.repeat(before.mean(axis=2, keepdims=True), 3, axis=2) if channels != 3 else before
    np.testing.assert_allclose(drawn(page, "#given-picture"), one, atol=0.51)  # rounded
    expect(page.locator("#given-channels")).to_be_visible(visible=channels != 3)
    page.get_by_label("Brush").fill("2")
    editor.scroll_into_view_if_needed()
    box = editor.bounding_box()
    assert box is not None
    assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02)
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 3 * box["width"] / 4, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    run, body = asked_with(page, n=1)
    made = mask_in(body) == 255
    assert made.shape == (height, width)
    assert made[height // 2 - 1 : height // 2 + 1, width // 4 : 3 * width // 4].all()
    assert not made[: height // 2 - 2].any()

    wanted = {name: value for name, value in body.items() if name not in ("stream", "preview_every")}
    after = pixels_of(answered(site, **wanted)[0])
    assert (after != before).any()
    np.testing.assert_array_equal(after[~made], before[~made])
    run.locator("button.frame").click()
    np.testing.assert_array_equal(drawn(page, "#detail-picture"), as_shown(after))
    page.get_by_text("Compare", exact=True).click()
    expect(page.locator("#before-picture")).to_be_visible()
    np.testing.assert_array_equal(drawn(page, "#before-picture"), as_shown(before))
    page.get_by_text("Difference", exact=True).click()
    changed = as_shown(after) != as_shown(before)
    np.testing.assert_array_equal(drawn(page, "#difference").any(axis=2), changed.any(axis=2))
    share = (after != before).any(axis=2) if channels == 3 else after != before
    expect(page.locator("#difference-text")).to_contain_text(f"{100 * share.mean():.1f} % of the pixels")
    assert_accessible(page)


def test_arrays_are_previewed_downloaded_and_made_again_by_copied_code(
    new_context: NewContext, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none_is_asked_for(*_: Any) -> bytes:
        raise AssertionError

    monkeypatch.setattr(Thumbnails, "get", none_is_asked_for)
    page = chosen(new_context().new_page(), site, TALL)
    expect(page.locator("#classes label")).to_have_count(1 + len(CLASS_NAMES))
    denoiser = site.denoisers[1]
    denoiser.let.clear()
    page.get_by_role("button", name="Generate").click()
    denoiser.let_steps(10)
    preview = page.locator(".run .frame img").first
    expect(preview).to_have_js_property("naturalWidth", 16)  # two channels beside each other
    denoiser.let.set()
    page.locator(".run").get_by_role("button", name="Copy curl").wait_for()

    page.get_by_role("button", name="Clear").click()
    run, body = asked_with(page, n=2)
    assert body["format"] == "npy"
    files = answered(site, **{name: value for name, value in body.items() if name not in ("stream", "preview_every")})
    with page.expect_download() as download:
        run.get_by_role("button", name="Download zip").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist() == ["0000-Cat-seed7-0.npy", "0001-Cat-seed7-1.npy"]
        assert [archive.read(name) for name in archive.namelist()] == files
    run.locator("button.frame").nth(1).click()
    dialog = page.get_by_role("dialog")
    with page.expect_download() as download:
        dialog.get_by_role("button", name="Download npy").click()
    assert Path(download.value.path()).read_bytes() == files[1]
    dialog.get_by_text("Python", exact=True).click()
    subprocess.run([sys.executable, "-c", page.locator("#detail-code").inner_text()], cwd=tmp_path, check=True)
    assert (tmp_path / "Cat-seed7-1.npy").read_bytes() == files[1]
    dialog.get_by_role("button", name="Edit this picture").click()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    _, body = asked_with(page, n=1)
    np.testing.assert_array_equal(pixels_of(base64.b64decode(body["image"])), pixels_of(files[1]))
    page.reload()
    expect(page.locator(".run")).to_have_count(2)


@pytest.mark.parametrize("width", [1280, 360])
def test_a_tall_picture_stays_on_the_screen_and_keeps_its_caption(
    new_context: NewContext, site: Site, width: int
) -> None:
    context = new_context(viewport={"width": width, "height": 800}, has_touch=True, is_mobile=width < 600)
    page = chosen(context.new_page(), site, TALL)
    page.get_by_label("Choose a picture").set_input_files(file_of(given(TALL)))
    editor = page.get_by_role("application", name="Mask of the picture")
    expect(editor).to_be_visible()
    box = editor.bounding_box()
    assert box is not None
    assert box["height"] <= 400
    run, _ = asked_with(page)
    for name in run.locator(".caption > :first-child").all():
        assert name.evaluate("(shown) => shown.scrollWidth <= shown.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") == width
