"""Cascades and models with conditioning images on the page: their options, what they need, and what is shown."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import FilePayload, Locator, Page, expect

from tests.browser.conftest import Site, serving
from tests.browser.test_page import NewContext, answered, ask, assert_accessible, expect_state, shown
from tests.browser.test_page_given import DROP, Pixels, pixels_of, png
from tests.fakes import CLASS_NAMES, tiny_config
from tests.integration.in_process import PausedDenoiser

SMALL: Pixels = np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)
PHOTOGRAPH: Pixels = np.random.default_rng(1).integers(0, 256, (20, 12, 3), np.uint8)
UP, PAIRED = "m1", "m2"
MISSING = "Choose one first: this model cannot run without it."


def of(**changes: object) -> PausedDenoiser:
    denoiser = PausedDenoiser()
    denoiser.config = tiny_config(**changes)
    return denoiser


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Serve a base, an upsampler, both as a cascade, and a model that is trained on pairs."""
    models = of(image_size=4, attention_resolutions=()), of(low_res_size=4), of(cond_channels=1)
    with serving(*models, cascades=("both=m0+m1",)) as site:
        yield site


@pytest.fixture(autouse=True)
def running(site: Site) -> Iterator[None]:
    yield
    for denoiser in site.denoisers:
        denoiser.let.set()


def chosen(page: Page, site: Site, model: str) -> Page:
    page.goto(site.url)
    page.locator("#model").select_option(model)
    return page


def choose(page: Page, content: bytes, name: str = "small.png") -> Locator:
    """Choose a conditioning image; return how it is shown."""
    page.locator("#cond").set_input_files({"name": name, "mimeType": "", "buffer": content})
    expect(page.locator("#cond-name")).to_have_text(name)
    return page.locator("#cond-picture")


def asked_with(page: Page, **fields: Any) -> tuple[Locator, dict[str, Any]]:
    """Press the button; return the finished run, and the body of its request."""
    with page.expect_request("**/v1/generate") as request:
        run = ask(page, **fields)
    expect_state(run, "done")
    return run, json.loads(request.value.post_data or "")


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def npy(array: Pixels) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_cascade_has_the_options_of_its_upsampler(page: Page, site: Site) -> None:
    chosen(page, site, "m0")
    stage = page.get_by_role("group", name="Second stage")
    expect(stage).to_be_hidden()
    page.locator("#model").select_option("both")
    expect(stage).to_contain_text("The model m0 makes a small picture by the settings above, and m1 enlarges it.")
    expect(stage.get_by_label("Upsampling guidance")).to_have_value("1.5")
    expect(page.get_by_label("Upsampling classifier guidance")).to_be_hidden()
    stage.get_by_label("Upsampling steps").fill("10")
    stage.get_by_label("Upsampling sampler").select_option("DDIM")
    stage.get_by_label("Upsampling guidance").fill("1")
    expect(page.locator("#upsample-cfg-scale-value")).to_have_text("off")
    run, body = asked_with(page)
    assert body["upsample"] == {"steps": 10, "sampler": "ddim", "cfg_scale": 1}
    wanted = {"class": "Cat", "n": 2, "steps": 20, "seed": 7, "cfg_scale": 1, "upsample": body["upsample"]}
    assert shown(run) == answered(site, model="both", **wanted)
    expect(run).to_contain_text("20 steps · Ancestral · then 10 steps · DDIM · seed 7")
    run.locator("button.frame").first.click()
    expect(page.locator("#detail-facts")).to_contain_text("Upsampled10 steps, DDIM")
    page.reload()
    expect(page.get_by_label("Upsampling steps")).to_have_value("10")
    expect(page.get_by_label("Upsampling sampler")).to_have_value("ddim")


def test_a_cascade_shows_progress_and_previews_of_both_stages(page: Page, site: Site) -> None:
    chosen(page, site, "both")
    page.get_by_label("Upsampling steps").fill("10")
    expect(page.locator(".thumb img")).to_have_count(len(CLASS_NAMES))  # from then on, the base is idle
    base, upsampler, _ = site.denoisers
    base.let.clear()
    run = ask(page, n=1)
    picture = run.locator(".frame img")
    for denoiser, steps, side in ((base, 6, 4), (upsampler, 24, 8)):
        denoiser.let_steps(steps if denoiser is base else 4)
        expect(run.locator(".time")).to_have_text(f"{steps}/30")
        expect(run.get_by_role("progressbar")).to_have_js_property("value", steps / 30)
        expect(picture).to_have_js_property("naturalWidth", side)
        expect(run.locator(".bar-of")).to_have_attribute("style", re.compile(rf"--done: {steps / 30}.*--border: 0\.66"))
        upsampler.let.clear()
        base.let.set()
    upsampler.let.set()
    expect_state(run, "done")


def test_errors_of_the_second_stage_are_shown_by_their_fields(page: Page, site: Site) -> None:
    chosen(page, site, "both")
    errors = [{"field": f"upsample.{name}", "message": f"no {name}"} for name in ("steps", "sampler")]
    problem = json.dumps({"type": "x", "title": "X", "status": 422, "detail": "it is what it is", "errors": errors})
    page.route("**/v1/generate", lambda route: route.fulfill(status=422, body=problem))
    expect_state(ask(page), "failed")
    for name in ("Upsampling steps", "Upsampling sampler"):
        expect(page.get_by_label(name)).to_have_accessible_description(f"No {name.split()[1]}.")
    assert_accessible(page)


def test_a_model_with_a_conditioning_image_is_not_asked_without_one(page: Page, site: Site) -> None:
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    chosen(page, site, UP)
    expect(page.get_by_role("group", name="Picture to enlarge")).to_contain_text("The model takes 4 × 4 pixels, grey.")
    file = page.get_by_label("Choose a small picture")
    page.keyboard.press("Control+Enter")
    expect(file).to_be_focused()
    expect(file).to_have_accessible_description(f"or drop or paste one. The model takes 4 × 4 pixels, grey. {MISSING}")
    expect(page.locator(".run")).to_have_count(0)
    assert_accessible(page)
    assert not [url for url in requests if "generate" in url or f"{UP}/thumbnails" in url]

    choose(page, png(SMALL))
    expect(page.locator(".error")).to_have_count(0)
    run, body = asked_with(page)
    wanted = {"model": UP, "class": "Cat", "n": 2, "steps": 20, "seed": 7, "cfg_scale": 1}
    assert shown(run) == answered(site, **wanted, cond=b64(png(SMALL)))
    assert body["cond"] == b64(png(SMALL))
    expect(run.locator(".condition img")).to_have_attribute("src", f"data:image/png;base64,{b64(png(SMALL))}")
    expect(run.locator(".condition")).to_have_text("To enlarge")
    expect(run).to_contain_text("enlarged")
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator("#cond-chosen")).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text(MISSING)).to_be_visible()
    expect(page.locator(".run")).to_have_count(1)


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_a_conditioning_image_of_another_size_is_fitted_by_the_service(page: Page, site: Site, fit: str) -> None:
    chosen(page, site, PAIRED)
    picture = choose(page, png(PHOTOGRAPH))
    page.get_by_label("Fit of the conditioning image").select_option(fit)
    expect(picture).to_have_css("object-fit", {"crop": "cover", "resize": "fill"}[fit])
    run, _ = asked_with(page)
    wanted = {"model": PAIRED, "class": "Cat", "n": 2, "steps": 20, "seed": 7, "cfg_scale": 1, "fit": fit}
    assert shown(run) == answered(site, **wanted, cond=b64(png(PHOTOGRAPH)))
    run.locator("button.frame").first.click()
    page.get_by_text("Compare", exact=True).click()
    expect(page.locator("#before-picture")).to_be_visible()
    expect(page.get_by_text("Difference", exact=True)).to_be_hidden()


def test_arrays_condition_too_and_what_cannot_is_refused_by_the_field(page: Page, site: Site) -> None:
    chosen(page, site, PAIRED)
    file = page.get_by_label("Choose a conditioning image")
    file.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.get_by_text("Must be a PNG, WebP or JPEG picture, or an npy or npz file.")).to_be_visible()
    expect(page.locator("#cond-chosen")).to_be_hidden()
    expect(choose(page, npy(np.zeros((1, 8, 8, 2), np.uint8)), "two.npy")).to_be_hidden()
    run = ask(page)
    expect_state(run, "failed")
    expect(page.locator("[data-fields=cond] .error")).to_contain_text("must have shape [8, 8, 1]", ignore_case=True)
    choose(page, npy(np.zeros((8, 8, 1), np.uint8)), "one.npy")
    run, _ = asked_with(page)
    expect(run.locator(".condition")).to_have_text("ArrayCondition")
    run.locator("button.frame").first.click()
    expect(page.get_by_role("radiogroup", name="View")).to_be_hidden()


def test_a_file_that_cannot_be_read_is_refused_by_the_field(page: Page, site: Site) -> None:
    chosen(page, site, PAIRED)
    fail = "() => { FileReader.prototype.readAsDataURL = function () { this.onerror(); }; }"
    page.evaluate(fail)  # as for a dropped folder
    page.locator("#cond").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b""})
    expect(page.get_by_text("Must be a PNG, WebP or JPEG picture, or an npy or npz file.")).to_be_visible()


def test_nothing_is_generated_while_a_conditioning_image_is_read(page: Page, site: Site) -> None:
    chosen(page, site, PAIRED)
    generate = page.get_by_role("button", name="Generate")
    old, new = (png(np.full((8, 8), level, np.uint8)) for level in (10, 20))
    choose(page, old, "old.png")
    page.evaluate(
        """() => {
            const read = FileReader.prototype.readAsDataURL;
            FileReader.prototype.readAsDataURL = function (blob) { window.go = () => read.call(this, blob); };
        }"""
    )
    second: FilePayload = {"name": "new.png", "mimeType": "image/png", "buffer": new}
    page.locator("#cond").set_input_files(second)
    expect(generate).to_be_disabled()
    page.keyboard.press("Control+Enter")
    page.locator("#model").select_option("m0")  # takes none
    expect(generate).to_be_enabled()
    page.locator("#model").select_option(PAIRED)
    expect(generate).to_be_disabled()
    page.evaluate("() => go()")
    expect(page.locator("#cond-name")).to_have_text("new.png")
    expect(page.locator(".run")).to_have_count(0)
    _, body = asked_with(page)
    assert body["cond"] == b64(new)

    page.locator("#cond").set_input_files(second)
    expect(generate).to_be_disabled()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(generate).to_be_enabled()
    page.evaluate("() => go()")
    generate.click()
    expect(page.get_by_text(MISSING)).to_be_visible()


def test_dropped_files_go_where_they_are_dropped_and_else_to_what_is_missing(page: Page, site: Site) -> None:
    chosen(page, site, PAIRED)
    drop = DROP.replace("document.body", "document.querySelector(where)")
    drop = drop.replace("(picture, type)", "([picture, type, where])")
    pictures = [np.full((8, 8), level, np.uint8) for level in (10, 20, 30)]
    for picture, type_, where in zip(pictures, ("drop", "paste", "drop"), ("body", "body", "#cond-hint"), strict=True):
        page.evaluate(drop, [b64(png(picture)), type_, where])
        shown_at = "#given-edit" if type_ == "paste" else "#cond-chosen"
        expect(page.locator(shown_at)).to_be_visible()
    expect(page.locator("#cond-picture")).to_have_attribute("src", f"data:image/png;base64,{b64(png(pictures[2]))}")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.get_by_label("Strength").fill("0")
    run, body = asked_with(page)
    assert body["cond"] == b64(png(pictures[2]))
    for result in shown(run):
        np.testing.assert_array_equal(pixels_of(result), pictures[1])


def test_a_result_is_enlarged_by_hand_as_the_cascade_does(page: Page, site: Site) -> None:
    chosen(page, site, "m0")
    run, _ = asked_with(page, n=1)
    run.locator("button.frame").click()
    dialog = page.get_by_role("dialog", name="Cat")
    expect(dialog.get_by_role("button", name="Condition")).to_have_count(0)
    dialog.get_by_role("button", name="Enlarge with m1").click()
    expect(page.locator("#model")).to_have_value(UP)
    expect(page.get_by_role("radio", name="Cat", exact=True)).to_be_checked()
    expect(page.get_by_label("Choose a small picture")).to_be_focused()
    expect(page.locator("#cond-chosen")).to_be_visible()
    by_hand, _ = asked_with(page, n=1, seed=8, steps=25)
    options = {"steps": 25, "cfg_scale": 1}
    wanted = {"class": "Cat", "n": 1, "steps": 20, "seed": 7, "cfg_scale": 1, "upsample": options}
    assert shown(by_hand) == answered(site, model="both", **wanted)
    by_hand.locator("button.frame").click()
    expect(page.get_by_role("button", name="Condition m2 on it")).to_be_visible()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_no_violations_and_nothing_is_wider_than_the_screen(
    new_context: NewContext, site: Site, scheme: Any, width: int
) -> None:
    page = new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=True, is_mobile=width < 600
    ).new_page()
    for model in ("both", PAIRED):
        chosen(page, site, model)
        if model == PAIRED:
            choose(page, png(PHOTOGRAPH), "a rather long name of a photograph.png")
        expect_state(ask(page), "done")
        assert_accessible(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
