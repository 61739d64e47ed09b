"""Take the pictures of the page in the documentation anew, from services that are started for them.

    python -m benchmarks.page_picture

Writes playground.png (a run in progress), page_editor.png (a picture with a painted mask, and what was made of it) and
page_cascade.png (a cascade in its first stage) to docs/images. No upsampler is bundled: the second stage of the cascade
has no training, and is not shown. Needs Chromium, and playwright from the extra `dev`.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.given_pictures import ROOT, service
from diffusion.config import CheckpointConfig
from diffusion.unet import UNet
from formats.checkpoint import write_checkpoint
from formats.checkpoint_config import read_config

MODEL = ROOT / "models" / "fashion32"
GIVEN = ROOT / "docs" / "images" / "given" / "shirt.png"
PATIENCE_MS = 300_000
COLORS = 128
CASCADE = "fashion64"


def start(page: Page, images: int, steps: int, seed: int) -> None:
    """Ask for images."""
    page.get_by_label("Images", exact=True).fill(str(images))
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Roll before each run").uncheck()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()


def taken(page: Page) -> Image.Image:
    """Return a picture of what is visible."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLORS)


def playground(page: Page) -> Image.Image:
    """Show a finished run, and another when its first two images are finished."""
    page.set_viewport_size({"width": 1440, "height": 900})
    start(page, images=8, steps=50, seed=12)
    expect(page.locator(".run").first).to_have_attribute("data-state", "done")
    start(page, images=8, steps=100, seed=21)
    expect(page.locator(".run").first.locator(".time").nth(1)).to_have_text(re.compile(r"^100/100$|s$"))
    picture = taken(page)
    page.get_by_role("button", name="Cancel").click()
    return picture


def editor(page: Page) -> Image.Image:
    """Show a picture whose right half is painted, and four images that were made of it."""
    page.set_viewport_size({"width": 1280, "height": 760})
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("radio", name="T-shirt/top", exact=True).check()
    page.get_by_label("Choose a picture").set_input_files(GIVEN)
    box = page.get_by_role("application", name="Mask of the picture")
    page.get_by_label("Brush").fill("16")
    page.get_by_label("Strength").fill("1")
    box.evaluate("(shown) => shown.scrollIntoView({ block: 'center', behavior: 'instant' })")
    place = box.bounding_box()
    assert place is not None
    page.mouse.move(place["x"] + 0.76 * place["width"], place["y"])
    page.mouse.down()
    page.mouse.move(place["x"] + 0.76 * place["width"], place["y"] + place["height"], steps=20)
    page.mouse.up()
    page.get_by_label("Resample").check()
    start(page, images=6, steps=50, seed=1)
    expect(page.locator(".run").first).to_have_attribute("data-state", "done")
    box.evaluate("(shown) => shown.scrollIntoView({ block: 'center', behavior: 'instant' })")
    return taken(page)


def cascade(page: Page) -> Image.Image:
    """Show a run of a cascade when its first stage is nearly done."""
    page.set_viewport_size({"width": 1280, "height": 760})
    page.locator("#model").select_option(CASCADE)
    page.get_by_label("Upsampling steps").fill("25")
    start(page, images=6, steps=50, seed=12)
    expect(page.locator(".run .time").first).to_have_text(re.compile(r"^(4[5-9]|50)/75$"))
    page.get_by_role("group", name="Second stage").evaluate(
        "(shown) => shown.scrollIntoView({ block: 'center', behavior: 'instant' })"
    )
    return taken(page)


def write_upsampler(folder: Path) -> None:
    """Write a small network without training, to twice the size of the bundled model's images."""
    base = read_config(MODEL)
    assert isinstance(base, CheckpointConfig)
    small = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
    model = base.model.replace(image_size=2 * base.model.image_height, low_res_size=base.model.image_size, **small)
    config = base.replace(model=model)
    write_checkpoint(folder, config, UNet(config.model).state_dict())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page_picture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (docs/images)")
    args = parser.parse_args()
    expect.set_options(timeout=PATIENCE_MS)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        upsampler = Path(name) / "up64"
        write_upsampler(upsampler)
        classes = len(read_config(MODEL).class_names or ())
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        models = ("--model", MODEL, "--model", upsampler, "--cascade", f"{CASCADE}={MODEL.name}+{upsampler.name}")
        for arguments, pictures in (
            (("--model", MODEL), {"playground": playground, "page_editor": editor}),
            (models, {"page_cascade": cascade}),
        ):
            with service(*arguments) as url:
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                page.set_default_timeout(PATIENCE_MS)
                page.goto(url)
                expect(page.locator(".thumb img")).to_have_count(classes)
                for picture, take in pictures.items():
                    path = args.out / f"{picture}.png"
                    take(page).save(path, optimize=True)
                    print(f"wrote {path}")
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
