"""The page at `/` in a real browser: its use, and its messages when something fails."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect

from diffusion.config import CheckpointConfig, DiffusionConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import SAMPLERS, Sampler, ancestral_plan
from service.http.door.keys import ApiKey, hash_of, new_key
from service.http.door.keys_file import write_keys
from tests.browser.conftest import Site, serving
from tests.counts import LONG
from tests.fakes import CLASS_NAMES, tiny_config
from tests.integration.in_process import PausedDenoiser
from tests.waiting import PATIENCE_S

STEPS = 20
LONG_ONLY = pytest.mark.skipif(not LONG, reason="seconds of a browser: IDDPM_TEST_LONG=1")
NewContext = Callable[..., BrowserContext]
FILL = """() => {
    for (let filler = "", size = 1 << 22; size > 0; size >>= 1) {
        try {
            sessionStorage.setItem("filler", filler + "x".repeat(size));
            filler += "x".repeat(size);
        } catch {}
    }
}"""
"""Leaves no space in the storage of the tab."""
FORBID = """
    for (const name of ["sessionStorage", "localStorage"]) {
        Object.defineProperty(window, name, { get() { throw new DOMException("Access is denied", "SecurityError"); } });
    }
"""
"""What a browser does that blocks the data of sites."""


def opened(page: Page, site: Site) -> Page:
    """Open the page, and wait until its gallery is complete and the network is idle."""
    page.goto(site.url)
    expect(page.locator(".thumb img")).to_have_count(len(CLASS_NAMES))
    return page


def ask(
    page: Page, *, name: str = "Cat", n: int = 2, steps: int = STEPS, seed: int = 7, guidance: float = 1
) -> Locator:
    """Fill in the form, and press the button; return the run."""
    page.get_by_role("radio", name=name, exact=True).check()
    page.get_by_label("Images", exact=True).fill(str(n))
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Guidance", exact=True).fill(str(guidance))
    page.get_by_label("Roll before each run").uncheck()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    return page.locator(".run").first


def expect_state(run: Locator, state: str) -> None:
    expect(run).to_have_attribute("data-state", state)


def shown(run: Locator) -> list[bytes]:
    """Return the images of a run, as files."""
    sources = [image.get_attribute("src") or "" for image in run.locator("button.frame img").all()]
    return [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]


def answered(site: Site, **body: Any) -> list[bytes]:
    """Return the images that the service gives for a request."""
    answer = httpx.post(site.url + "v1/generate", json=body, timeout=PATIENCE_S).json()
    return [base64.b64decode(image["b64_json"]) for image in answer["images"]]


def titles() -> list[str]:
    """Return the names of the samplers on the page."""
    return ["Ancestral", "DDIM", "DPM++", "SDE-DPM++"]


def test_the_samplers_are_those_of_the_service(page: Page, site: Site) -> None:
    opened(page, site)
    choices = page.locator("#samplers input")
    assert [choice.get_attribute("value") for choice in choices.all()] == list(SAMPLERS)
    assert page.locator("#samplers").inner_text().split() == titles()
    expect(page.get_by_role("radio", name="Ancestral")).to_be_checked()


def test_a_sampler_that_is_registered_is_offered(page: Page, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Sampler(plan=ancestral_plan, recommended_steps=(3, 30))
    monkeypatch.setitem(SAMPLERS, "toy", toy)
    opened(page, site)
    page.locator("#samplers").get_by_text("Toy", exact=True).click()
    expect(page.get_by_text("Recommended for Toy: 3 to 30.")).to_be_visible()
    expect(page.get_by_label("Eta", exact=True)).to_be_hidden()
    expect(page.locator("#upsample-sampler option")).to_have_text([*titles(), "Toy"])
    with page.expect_request("**/v1/generate") as request:
        run = ask(page, steps=5, n=1)
    expect_state(run, "done")
    assert json.loads(request.value.post_data or "")["sampler"] == "toy"
    expect(run).to_contain_text("5 steps · Toy")


def test_a_sampler_brings_its_options_and_its_recommended_steps(page: Page, site: Site) -> None:
    opened(page, site)
    steps, eta = page.get_by_label("Steps", exact=True), page.get_by_label("Eta", exact=True)
    expect(eta).to_be_hidden()
    page.locator("#samplers").get_by_text("DPM++", exact=True).click()
    least, most = SAMPLERS["dpm++"].recommended_steps
    expect(steps).to_have_value(str(most))  # it was 100
    expect(page.locator("#steps-value")).to_have_text(str(most))
    expect(page.get_by_text(f"Recommended for DPM++: {least} to {most}.")).to_be_visible()
    page.locator("#samplers").get_by_text("DDIM", exact=True).click()
    expect(steps).to_have_value(str(SAMPLERS["ddim"].recommended_steps[0]))
    eta.fill("0.5")
    run = ask(page)
    expect_state(run, "done")
    expect(run).to_contain_text("20 steps · DDIM · eta 0.5")
    wanted = {"class": "Cat", "n": 2, "steps": STEPS, "sampler": "ddim", "eta": 0.5, "cfg_scale": 1, "seed": 7}
    assert shown(run) == answered(site, **wanted)
    page.reload()
    expect(page.get_by_role("radio", name="DDIM")).to_be_checked()
    expect(eta).to_have_value("0.5")


def test_it_shows_the_images_of_the_request(page: Page, site: Site) -> None:
    run = ask(opened(page, site), name="T-shirt/top", guidance=2.5)
    expect_state(run, "done")
    wanted = {"class": "T-shirt/top", "n": 2, "steps": STEPS, "seed": 7, "cfg_scale": 2.5}
    assert shown(run) == answered(site, **wanted)
    expect(run.locator(".caption")).to_have_text(
        [re.compile(r"T-shirt/top\d+\.\d sseed 7$"), re.compile("seed 7 · 1$")]
    )
    expect(run.get_by_text(re.compile(r"^\d+\.\d s in all$"))).to_be_visible()


def test_previews_are_shown_during_sampling(page: Page, site: Site) -> None:
    opened(page, site)
    site.denoiser.let.clear()
    run = ask(page)
    expect(run.locator("canvas")).to_have_count(2)  # noise
    site.denoiser.let_steps(3)
    expect(run.locator(".time")).to_have_text(["3/20", "3/20"])
    expect(run.get_by_text(re.compile(r"^(About \d+\.\d s left|Sampling)$"))).to_be_visible()
    expect(run.locator(".frame img")).to_have_count(2)
    early = shown(run)
    site.denoiser.let_steps(7)
    expect(run.locator(".time")).to_have_text(["10/20", "10/20"])
    expect(run.get_by_role("progressbar")).to_have_js_property("value", 0.5)
    site.until(lambda: all(now != then for now, then in zip(shown(run), early, strict=True)))
    expect(page.locator("#load")).to_have_text(re.compile("^2 running, 0 waiting"))
    site.denoiser.let.set()
    expect_state(run, "done")
    expect(page.locator("#load")).to_have_text("Idle")


def test_a_cancelled_run_frees_its_rows(page: Page, site: Site) -> None:
    opened(page, site)
    site.denoiser.let.clear()
    run = ask(page)
    site.denoiser.let_steps(1)
    expect_state(run, "sampling")
    run.get_by_role("button", name="Cancel").click()
    expect_state(run, "cancelled")
    site.until(lambda: site.metric("iddpm_requests_total", outcome="cancelled") == 1)
    site.denoiser.let_steps(1)
    site.until(lambda: site.metric("iddpm_remaining_row_steps") == 0)
    site.denoiser.let.set()
    run.get_by_role("button", name="Try again").click()
    expect_state(page.locator(".run"), "done")


def test_errors_are_shown_in_plain_words(page: Page) -> None:
    class AfraidOfBees(PausedDenoiser):
        afraid = False

        def __call__(self, inputs: NetworkInputs[Any]) -> Any:
            if self.afraid and np.any(inputs.y == CLASS_NAMES.index("Bee")):
                raise ValueError("secret of the machine")
            return super().__call__(inputs)

    denoiser = AfraidOfBees()
    with serving(denoiser, max_row_steps=100) as site:
        opened(page, site)
        too_much = ask(page, n=16, steps=200)
        expect(too_much).to_contain_text("This cannot be generated")
        expect(too_much).to_contain_text("must be at most 100 per request")

        page.route("**/v1/generate", lambda route: _refuse(route, 503, {"Retry-After": "12"}))
        expect(ask(page)).to_contain_text("The service is busy Try again in about 12 s.")
        page.unroute("**/v1/generate")

        denoiser.afraid = True
        failed = ask(page, name="Bee")
        expect(failed).to_contain_text("Something went wrong in the service Image 0: the network failed on it")
        expect(failed).not_to_contain_text("secret")
    gone = ask(page)
    expect(gone).to_contain_text("No answer from the service")
    expect(page.locator("#load")).to_have_text("The service does not answer")


def _refuse(route: Route, status: int, headers: dict[str, str]) -> None:
    problem = {"type": "urn:iddpm:x", "title": "X", "status": status, "detail": "it is what it is"}
    route.fulfill(status=status, headers=headers, content_type="application/problem+json", body=json.dumps(problem))


def test_a_reload_keeps_settings_and_images_and_ends_runs_in_progress(page: Page, site: Site) -> None:
    run = ask(opened(page, site), name="Bee", guidance=3)
    expect_state(run, "done")
    pictures = shown(run)
    site.denoiser.let.clear()
    ask(page, name="Bee", guidance=3)
    site.until(lambda: site.metric("iddpm_remaining_row_steps") > 0)
    page.reload()
    site.until(lambda: site.metric("iddpm_requests_total", outcome="cancelled") == 1)
    expect(page.locator(".run")).to_have_count(1)
    assert shown(page.locator(".run")) == pictures
    expect(page.get_by_role("radio", name="Bee", exact=True)).to_be_checked()
    expect(page.get_by_label("Steps", exact=True)).to_have_value(str(STEPS))
    expect(page.get_by_label("Guidance", exact=True)).to_have_value("3")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    page.get_by_role("button", name="Clear").click()
    page.reload()
    expect(page.locator(".run")).to_have_count(0)


def test_a_run_that_is_too_large_to_keep_replaces_no_other(page: Page, site: Site) -> None:
    expect_state(ask(opened(page, site), n=1), "done")
    page.evaluate(FILL)
    expect_state(ask(page, n=4, seed=8), "done")
    page.reload()
    expect(page.locator(".run")).to_have_count(1)
    expect(page.locator(".run")).to_contain_text("seed 7")


def test_settings_that_do_not_fit_into_the_storage_stop_nothing(page: Page, site: Site) -> None:
    opened(page, site)
    page.get_by_label("Seed", exact=True).fill("7")
    page.evaluate(FILL)
    expect_state(ask(page, n=1, seed=123_456_789), "done")
    page.reload()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")


def test_a_browser_that_forbids_storage_shows_the_page_all_the_same(new_context: NewContext, tmp_path: Path) -> None:
    key, keys_file = new_key(), tmp_path / "keys.json"
    write_keys(keys_file, [ApiKey(name="alice", sha256=hash_of(key))])
    context = new_context(color_scheme="dark")
    context.add_init_script(FORBID)
    page = context.new_page()
    with serving(keys_file=keys_file) as site:
        page.goto(site.url)
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect_state(ask(page, n=1), "done")
        page.get_by_role("button", name="Light").click()
        expect(page.get_by_role("button", name="Dark")).to_be_visible()
        page.get_by_role("button", name="Clear").click()
        expect(page.locator(".run")).to_have_count(0)


def test_two_tabs_share_the_service_and_nothing_else(new_context: NewContext, site: Site) -> None:
    context = new_context()
    first, second = opened(context.new_page(), site), opened(context.new_page(), site)
    site.denoiser.let.clear()
    mine, other = ask(first, name="Ape"), ask(second, name="Bee", seed=8)
    expect(mine.locator(".status")).to_contain_text("Starting")
    expect(other.locator(".status")).to_contain_text("Waiting for 2 images")
    site.denoiser.let_steps(5)
    for page in (first, second):
        both = re.compile("^(4 running, 0|3 running, 1|2 running, 2) waiting")  # by the width, which was measured
        expect(page.locator("#load")).to_have_text(both)
    site.denoiser.let.set()
    for run in (mine, other):
        expect_state(run, "done")
    for page, run, name, seed in ((first, mine, "Ape", 7), (second, other, "Bee", 8)):
        expect(page.locator(".run")).to_have_count(1)
        expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
        assert shown(run) == answered(site, **{"class": name}, n=2, steps=STEPS, seed=seed, cfg_scale=1)


def test_copied_code_and_downloads_give_equal_images(new_context: NewContext, site: Site, tmp_path: Path) -> None:
    page = opened(new_context(permissions=["clipboard-read", "clipboard-write"]).new_page(), site)
    run = ask(page, name="T-shirt/top")
    expect_state(run, "done")
    with page.expect_download() as download:
        run.get_by_role("button", name="Download zip").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["0000-T-shirt-top-seed7-0.png", "0001-T-shirt-top-seed7-1.png"]
        assert [archive.read(name) for name in archive.namelist()] == shown(run)

    run.get_by_role("button", name="Copy Python").click()
    expect(run.get_by_role("button", name="Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=PATIENCE_S)
    with zipfile.ZipFile(tmp_path / "iddpm-7.zip") as archive:
        assert [archive.read(name) for name in archive.namelist()] == shown(run)

    copy_curl = run.get_by_text(re.compile("^(Copy curl|Copied)$")).first
    copy_curl.click()
    copy_curl.click()  # while it still shows the result of the first copy
    expect(run.get_by_role("button", name="Copy curl")).to_be_visible()
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:3] == ["curl", "-s", f"{site.url}v1/generate"]
    assert json.loads(words[words.index("-d") + 1])["seed"] == 7

    run.get_by_role("button", name="T-shirt/top, seed 7, image 1: details").click()
    detail = page.get_by_role("dialog", name="T-shirt/top")
    with page.expect_download() as download:
        detail.get_by_role("button", name="Download PNG").click()
    assert Path(download.value.path()).read_bytes() == shown(run)[1]
    assert download.value.suggested_filename == "T-shirt-top-seed7-1.png"
    body = {"model": "m0", "class": "T-shirt/top", "steps": STEPS, "sampler": "ancestral", "cfg_scale": 1, "seed": 7}
    body["image_index"] = 1
    command = detail.locator("pre").inner_text()
    assert json.loads(command.split("-d '")[1].split("'")[0]) == body
    detail.get_by_text("Python", exact=True).click()
    box = detail.bounding_box()
    assert box is not None
    detail.locator("pre").hover()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 40, box["y"] + 40)
    page.mouse.up()
    expect(detail).to_be_visible()  # a selection that ends outside
    subprocess.run([sys.executable, "-c", detail.locator("pre").inner_text()], cwd=tmp_path, check=True)
    assert (tmp_path / "T-shirt-top-seed7-1.png").read_bytes() == shown(run)[1]


def test_the_page_can_be_used_with_the_keyboard_only(page: Page, site: Site) -> None:
    opened(page, site)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the pictures")).to_be_focused()
    page.get_by_role("radio", name="Any", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Ape", exact=True)).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Choose a picture")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Images", exact=True)).to_be_focused()
    page.keyboard.press("Home")
    expect(page.get_by_label("Images", exact=True)).to_have_value("1")
    page.keyboard.press("Control+Enter")
    run = page.locator(".run")
    expect_state(run, "done")
    run.locator(".frame").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Ape")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(run.locator(".frame")).to_be_focused()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_no_violations(new_context: NewContext, site: Site, scheme: str, width: int) -> None:
    page = opened(new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page(), site)
    run = ask(page)
    expect_state(run, "done")
    assert_accessible(page)
    run.locator(".frame").first.click()
    assert_accessible(page)
    page.keyboard.press("Escape")
    site.denoiser.let.clear()
    expect_state(ask(page), "waiting")
    assert_accessible(page)


def assert_accessible(page: Page) -> None:
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_a_narrow_screen_shows_everything_without_horizontal_scrolling(new_context: NewContext, site: Site) -> None:
    context = new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = opened(context.new_page(), site)
    run = ask(page, n=3)
    expect_state(run, "done")
    expect(run.locator(".frame").first).to_be_in_viewport()  # the page scrolled there
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    tops = [page.locator(part).bounding_box() for part in (".controls", ".stage", ".live")]
    assert [box["y"] for box in tops if box] == sorted(box["y"] for box in tops if box)
    run.locator(".frame").first.tap()
    box = page.get_by_role("dialog", name="Cat").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def many_classes() -> CheckpointConfig:
    """Describe a model of a thousand classes without names, whose thumbnails take two steps each."""
    config = tiny_config(null_class=False)
    changes = {"model": config.model.replace(num_classes=1000), "diffusion": DiffusionConfig(num_timesteps=2)}
    return config.model_copy(update={**changes, "class_names": None})


@LONG_ONLY
def test_a_thousand_classes_can_be_searched_and_are_sampled_when_visible(page: Page) -> None:
    denoiser = PausedDenoiser()
    denoiser.config = many_classes()
    with serving(denoiser) as site:
        page.goto(site.url)
        expect(page.locator(".thumb img").first).to_be_visible()
        search = page.get_by_label("Search classes")
        search.fill("99")
        expect(page.locator('label[title="99"]')).to_be_visible()
        found = [str(k) for k in range(1000) if "99" in str(k)]
        expect(page.locator("#classes label:not([hidden])")).to_have_count(len(found))
        search.press("Enter")
        expect(page.locator("#class-chosen")).to_have_text(found[0])
        search.fill("no such class")
        expect(page.get_by_text("No class is called “no such class”.")).to_be_visible()
        assert site.metric("iddpm_image_queue_seconds_count") < 100


def test_ctrl_enter_in_the_search_generates_the_chosen_class_once(page: Page) -> None:
    names = tuple(f"class {k}" for k in range(30))
    denoiser = PausedDenoiser()
    config = tiny_config()
    changes = {"model": config.model.replace(num_classes=len(names)), "class_names": names}
    denoiser.config = config.model_copy(update=changes)
    with serving(denoiser) as site:
        page.goto(site.url)
        page.get_by_role("radio", name="class 7", exact=True).check()
        search = page.get_by_label("Search classes")
        for text in ("", "a", "class 3"):
            search.fill(text)
            with page.expect_request("**/v1/generate") as request:
                search.press("Control+Enter")
            assert json.loads(request.value.post_data or "")["class"] == "class 7"
        search.fill("any")
        expect(page.get_by_text("No class is called “any”.")).to_be_visible()
        search.fill("class 2")
        search.press("Enter")
        expect(page.get_by_role("radio", name="class 2", exact=True)).to_be_checked()
        page.keyboard.down("Control")
        for _ in range(3):  # a key that is held repeats
            page.keyboard.down("Enter")
        expect(page.locator(".run")).to_have_count(4)


def test_an_event_may_arrive_in_parts_of_any_size(page: Page, site: Site) -> None:
    opened(page, site)
    events: list[dict[str, Any]] = [{"name": "a", "data": {"text": "x" * 50}}, {"name": "b", "data": [1, 2]}]
    sent = "".join(f"event: {event['name']}\ndata: {json.dumps(event['data'])}\n\n" for event in events)
    sent = f": keep-alive\n\n{sent}"
    for size in (1, 2, 3, 7, 64, 1000):
        found = page.evaluate(
            """async ([sent, size]) => {
                const { readEvents } = await import("./page/events.js");
                const bytes = new TextEncoder().encode(sent);
                const body = new ReadableStream({
                    start(controller) {
                        for (let k = 0; k < bytes.length; k += size) controller.enqueue(bytes.slice(k, k + size));
                        controller.close();
                    },
                });
                const found = [];
                for await (const event of readEvents({ body })) found.push(event);
                return found;
            }""",
            [sent, size],
        )
        assert found == events, size


def test_without_metrics_the_activity_is_not_shown(page: Page, site: Site) -> None:
    asked = []

    def hide(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=404, body="")

    page.route("**/metrics", hide)
    opened(page, site)
    expect(page.locator(".figures")).to_be_hidden()
    expect(page.locator("#load")).to_have_text("")
    page.wait_for_timeout(2500)
    assert len(asked) == 1


@LONG_ONLY
def test_an_unconditional_model_has_no_gallery_and_no_guidance(page: Page) -> None:
    denoiser = PausedDenoiser()
    denoiser.config = tiny_config(num_classes=None, null_class=False)
    with serving(PausedDenoiser(), denoiser) as site:
        opened(page, site)
        page.get_by_label("Model").select_option("m1")
        expect(page.get_by_role("group", name="Class")).to_be_hidden()
        expect(page.get_by_label("Guidance", exact=True)).to_be_hidden()
        page.get_by_label("Steps", exact=True).fill(str(STEPS))
        page.get_by_role("button", name="Generate").click()
        expect_state(page.locator(".run"), "done")
        expect(page.locator(".run h3")).to_have_text("Pictures")
        seed = int(page.get_by_label("Seed", exact=True).input_value())
        assert shown(page.locator(".run")) == answered(site, model="m1", n=4, steps=STEPS, seed=seed)


def test_a_service_with_keys_asks_for_one_and_the_tab_keeps_it(page: Page, tmp_path: Path) -> None:
    key = new_key()
    write_keys(tmp_path / "keys.json", [ApiKey(name="alice", sha256=hash_of(key))])
    with serving(keys_file=tmp_path / "keys.json") as site:
        page.goto(site.url)
        dialog = page.get_by_role("dialog", name="This service asks for a key")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use key").click()
        expect(dialog.get_by_text("The key was not accepted.")).to_be_visible()
        dialog.get_by_label("API key").fill(f"{key}\u200b")  # not valid in a header
        page.keyboard.press("Enter")
        expect(dialog.locator("#key:invalid")).to_be_visible()
        dialog.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator(".thumb img")).to_have_count(len(CLASS_NAMES))
        opened(page, site)
        run = ask(page)
        expect_state(run, "done")
        expect(page.locator("#load")).to_have_text("Idle")
        run.locator(".frame").first.click()
        code = page.locator("#detail-code")
        expect(code).to_contain_text('-H "Authorization: Bearer $API_KEY"')
        expect(code).not_to_contain_text(key)


@LONG_ONLY
def test_charts_agree_with_the_metrics(page: Page, site: Site) -> None:
    opened(page, site)
    for seed in range(3):
        answered(site, **{"class": 0}, steps=STEPS, seed=seed, cfg_scale=1)
    calls = int(site.metric("iddpm_rows_per_network_call_count"))
    expect(page.locator("#rows-summary")).to_have_text(re.compile(f"on average of {calls} calls"))
    expect(page.get_by_role("img", name=re.compile(r"^Requests by latency in seconds: \d+ up to"))).to_be_visible()
    heights = np.array([float(bar.get_attribute("height") or 0) for bar in page.locator("#rows .bar").all()])
    counts = [
        site.metric("iddpm_rows_per_network_call_bucket", le=str(float(rows))) for rows in (1, 2, 4, 8, 16, 32, 64)
    ]
    alone = np.diff([0, *counts, counts[-1]])
    assert list(np.argsort(heights)[-2:]) == list(np.argsort(alone)[-2:])


@LONG_ONLY
def test_the_theme_is_the_system_s_until_one_is_chosen(new_context: NewContext, site: Site) -> None:
    page = new_context(color_scheme="dark").new_page()
    page.goto(site.url)
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Light").click()
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == light
