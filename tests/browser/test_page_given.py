"""Given pictures on the page: choosing one, painting a mask on it, and comparing the result with it."""

from __future__ import annotations

import base64
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Site
from tests.browser.test_page import NewContext, answered, ask, assert_accessible, expect_state, opened, shown

Pixels = npt.NDArray[np.uint8]

SIDE = 8
GIVEN: Pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
DROP = """(picture, type) => {
    const bytes = Uint8Array.from(atob(picture), (character) => character.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], "picture.png", { type: "image/png" }));
    const event = type === "paste"
        ? new ClipboardEvent(type, { clipboardData: data, bubbles: true })
        : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(content: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def choose(page: Page, content: bytes = png(GIVEN)) -> Locator:
    """Choose a picture; return the editor of its mask."""
    page.get_by_label("Choose a picture").set_input_files({"name": "p.png", "mimeType": "image/png", "buffer": content})
    editor = page.get_by_role("application", name="Mask of the picture")
    expect(editor).to_be_visible()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    return editor


def asked_with(page: Page, **fields: Any) -> tuple[Locator, dict[str, Any]]:
    """Press the button; return the finished run, and the body of its request."""
    with page.expect_request("**/v1/generate") as request:
        run = ask(page, **fields)
    expect_state(run, "done")
    return run, json.loads(request.value.post_data or "")


def mask_in(body: dict[str, Any]) -> Pixels:
    return pixels_of(base64.b64decode(body["mask"]))


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_a_picture_of_another_size_is_fitted_by_the_service(page: Page, site: Site, fit: str) -> None:
    opened(page, site)
    picture = png(np.random.default_rng(1).integers(0, 256, (20, 12, 3), np.uint8))
    choose(page, picture)
    if fit != "crop":
        with page.expect_response("**/v1/generate"):
            page.get_by_label("Fit", exact=True).select_option(fit)
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.get_by_label("Strength").fill("0.5")
    run, body = asked_with(page)
    wanted = {"class": "Cat", "n": 2, "steps": 20, "seed": 7, "cfg_scale": 1, "strength": 0.5, "fit": fit}
    assert shown(run) == answered(site, **wanted, image=base64.b64encode(picture).decode())
    assert "mask" not in body
    expect(run).to_contain_text("strength 0.5")


def test_what_is_not_painted_is_kept_and_black_in_the_map(page: Page, site: Site) -> None:
    opened(page, site)
    editor = choose(page)
    page.get_by_label("Brush").fill("2")
    editor.scroll_into_view_if_needed()
    box = editor.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + box["width"] / 2, y, steps=3)
    page.mouse.up()
    page.get_by_label("Strength").fill("1")
    run, body = asked_with(page)
    made = mask_in(body) == 255
    assert made[3:5, 2:6].all()  # two rows, from a quarter to three quarters
    assert not made[[0, 1, 2, 5, 6, 7]].any()
    for result in map(pixels_of, shown(run)):
        np.testing.assert_array_equal(result[~made], GIVEN[~made])
        assert (result[made] != GIVEN[made]).any()

    run.locator(".frame").first.click()
    page.get_by_text("Difference", exact=True).click()
    heat = page.locator("#difference").evaluate(
        "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    )
    coloured = np.array(heat).reshape(SIDE, SIDE, 4)[..., :3].any(axis=2)
    difference = np.abs(pixels_of(shown(run)[0]).astype(int) - GIVEN)
    np.testing.assert_array_equal(coloured, difference > 0)
    expect(page.locator("#difference-most")).to_have_text(str(difference.max()))
    expect(page.locator("#difference-text")).to_contain_text(f"{100 * coloured.mean():.1f} % of the pixels")

    page.get_by_text("Compare", exact=True).click()
    split = page.get_by_label("Border")
    split.focus()
    page.keyboard.press("Home")
    expect(page.locator("#split-value")).to_have_text("0 % before")
    page.keyboard.press("End")
    expect(page.locator("#before-picture")).to_have_css("clip-path", "inset(0px 0% 0px 0px)")


def test_a_mask_is_painted_with_one_finger_and_the_page_does_not_scroll(new_context: NewContext, site: Site) -> None:
    context = new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = opened(context.new_page(), site)
    editor = choose(page)
    page.get_by_label("Brush").fill("1")
    editor.evaluate("(shown) => shown.scrollIntoView({ block: 'center', behavior: 'instant' })")
    box = editor.bounding_box()
    assert box is not None
    scrolled = page.evaluate("scrollY")
    fingers = context.new_cdp_session(page)

    def at(column: int, row: int, finger: int) -> dict[str, float]:
        assert box is not None
        x, y = box["x"] + (column + 0.5) * box["width"] / SIDE, box["y"] + (row + 0.5) * box["height"] / SIDE
        return {"x": x, "y": y, "id": finger}

    def touch(kind: str, *points: dict[str, float]) -> None:
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)})

    touch("touchStart", at(2, 1, 0))
    for row in range(2, 6):
        touch("touchMove", at(2, row, 0))
    touch("touchStart", at(2, 5, 0), at(7, 7, 1))  # a second finger
    touch("touchMove", at(2, 5, 0), at(7, 0, 1))
    touch("touchMove", at(2, 6, 0), at(7, 0, 1))
    touch("touchEnd")
    assert page.evaluate("scrollY") == scrolled
    wanted = np.zeros((SIDE, SIDE), np.uint8)
    wanted[1:7, 2] = 255
    np.testing.assert_array_equal(mask_in(asked_with(page)[1]), wanted)

    page.get_by_text("Erase", exact=True).tap()
    editor.evaluate("(shown) => shown.scrollIntoView({ block: 'center', behavior: 'instant' })")
    box = editor.bounding_box()
    touch("touchStart", at(2, 1, 0))
    touch("touchMove", at(2, 3, 0))
    touch("touchEnd")
    wanted[1:4, 2] = 0
    np.testing.assert_array_equal(mask_in(asked_with(page)[1]), wanted)


def test_a_mask_can_be_painted_with_the_keyboard(page: Page, site: Site) -> None:
    opened(page, site)
    editor = choose(page)
    editor.focus()
    wanted = np.zeros((SIDE, SIDE), np.uint8)
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Enter"):  # 2 x 2 in the middle, at first
        page.keyboard.press(key)
    wanted[2:4, 2:5] = 255
    expect(page.locator("#announcer")).to_have_text("Painted. 9 % is made anew, the rest is kept.")
    for key in ("ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#announcer")).to_have_text("Rectangle 3 by 2, columns 3 to 5, rows 5 to 6")
    page.keyboard.press("Space")
    wanted[4:6, 2:5] = 255
    for key in ("ArrowUp", "Delete"):
        page.keyboard.press(key)
    wanted[3:5, 2:5] = 0
    np.testing.assert_array_equal(mask_in(asked_with(page)[1]), wanted)

    page.get_by_role("button", name="Invert").press("Enter")
    page.get_by_label("Resample").check()
    page.get_by_label("Times", exact=True).fill("2")
    page.get_by_label("Steps each").fill("3")
    run, body = asked_with(page)
    np.testing.assert_array_equal(mask_in(body), 255 - wanted)
    assert body["resample"] == {"times": 2, "jump": 3}
    expect(run).to_contain_text("mask · resampled 2×3")

    page.get_by_role("button", name="Clear mask").press("Enter")
    expect(page.locator("#mask-share")).to_have_text("Nothing is painted: the whole picture changes.")
    expect(page.get_by_label("Resample")).to_be_disabled()
    body = asked_with(page)[1]
    assert "image" in body
    assert not body.keys() & {"mask", "resample"}
    page.get_by_role("button", name="Remove picture").press("Enter")
    expect(editor).to_be_hidden()
    assert not asked_with(page)[1].keys() & {"image", "mask", "strength", "resample"}


def test_a_picture_can_be_dropped_pasted_and_taken_from_a_result(page: Page, site: Site) -> None:
    opened(page, site)
    for type_, pixels in (("drop", GIVEN), ("paste", 255 - GIVEN)):
        page.evaluate(f"([picture, type]) => ({DROP})(picture, type)", [base64.b64encode(png(pixels)).decode(), type_])
        expect(page.locator("#given-edit")).to_be_visible()
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        run, body = asked_with(page)
        np.testing.assert_array_equal(pixels_of(base64.b64decode(body["image"])), pixels)
    run.locator(".frame").first.click()
    with page.expect_response("**/v1/generate"):
        page.get_by_role("button", name="Edit this picture").click()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    result = pixels_of(shown(run)[0])
    np.testing.assert_array_equal(pixels_of(base64.b64decode(asked_with(page)[1]["image"])), result)


def test_what_the_service_refuses_is_shown_by_its_field(page: Page, site: Site) -> None:
    opened(page, site)
    picture = page.get_by_label("Choose a picture")
    transparent = png(np.zeros((SIDE, SIDE, 4), np.uint8))
    picture.set_input_files({"name": "p.png", "mimeType": "image/png", "buffer": transparent})
    expect(picture).to_have_accessible_description(
        "or drop or paste one: PNG, WebP, JPEG, npy, npz Must have no transparent pixels."
    )
    expect(picture).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#given-edit")).to_be_hidden()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    assert_accessible(page)
    page.route("**/v1/generate", lambda route: route.fulfill(status=503, headers={"Retry-After": "12"}, body="{}"))
    picture.set_input_files({"name": "p.png", "mimeType": "image/png", "buffer": png(GIVEN)})
    expect(page.locator("#given-state")).to_have_text("The service is busy. Try again in about 12 s.")
    page.unroute("**/v1/generate")

    choose(page).focus()
    expect(picture).not_to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Enter")
    page.get_by_label("Resample").check()
    page.get_by_label("Times", exact=True).fill("21")
    run = ask(page)
    expect_state(run, "failed")
    expect(page.locator("[data-fields=resample] .error")).to_contain_text("20")
    assert_accessible(page)
    page.get_by_label("Times", exact=True).fill("2")
    expect_state(ask(page), "done")
    expect(page.locator(".error")).to_have_count(0)


def test_copied_code_gives_equal_images(new_context: NewContext, site: Site, tmp_path: Path) -> None:
    page = opened(new_context(permissions=["clipboard-read", "clipboard-write"]).new_page(), site)
    choose(page).focus()
    page.keyboard.press("Enter")
    page.get_by_label("Resample").check()
    run, body = asked_with(page, n=1)
    run.locator(".frame").click()
    code = page.locator("#detail-code")
    command, _, heredoc = code.inner_text().partition(" <<'BODY'\n")
    assert shlex.split(command)[-2:] == ["-d", "@-"]
    sent = {name: value for name, value in body.items() if name not in ("n", "stream", "preview_every")}
    assert json.loads(heredoc.removesuffix("\nBODY")) == sent
    page.get_by_role("dialog").get_by_text("Python", exact=True).click()
    subprocess.run([sys.executable, "-c", code.inner_text()], cwd=tmp_path, check=True)
    assert (tmp_path / "Cat-seed7-0.png").read_bytes() == shown(run)[0]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_no_violations_and_nothing_is_wider_than_the_screen(
    new_context: NewContext, site: Site, scheme: Any, width: int
) -> None:
    context = new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=True, is_mobile=width < 600
    )
    page = opened(context.new_page(), site)
    editor = choose(page)
    editor.tap()
    expect(page.locator("#mask-share")).to_contain_text("is made anew")
    page.get_by_label("Resample").check()
    assert_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    run = ask(page)
    expect_state(run, "done")
    run.locator(".frame").first.click()
    for view in ("Compare", "Difference"):
        page.get_by_text(view, exact=True).click()
        assert_accessible(page)
        box = page.get_by_role("dialog").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
