"""Take the README's picture of the page, with a run in progress at a service that was started for it.

    IDDPM_THREADS=1 iddpm serve --model models/fashion32 --port 8321
    python -m benchmarks.page_picture http://127.0.0.1:8321

Needs Chromium, and playwright from the extra `dev`.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "playground.png"
PATIENCE_MS = 300_000
COLORS = 128


def start(page: Page, steps: int, seed: int) -> None:
    """Ask for eight images of any class."""
    page.get_by_label("Images", exact=True).fill("8")
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_label("Roll before each run").uncheck()
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()


def take(url: str, classes: int) -> Image.Image:
    """Return a picture of the page: a finished run, and another when its first two images are finished."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.goto(url)
        expect(page.locator(".thumb img")).to_have_count(classes)
        start(page, steps=50, seed=12)
        expect(page.locator(".run").first).to_have_attribute("data-state", "done")
        start(page, steps=100, seed=21)
        expect(page.locator(".run").first.locator(".time").nth(1)).to_have_text(re.compile(r"^100/100$|s$"))
        taken = page.screenshot()
        browser.close()
    return Image.open(io.BytesIO(taken)).convert("RGB").quantize(COLORS)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page_picture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("url", help="address of the running service")
    parser.add_argument("--classes", type=int, default=10, help="classes of its model (10)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="file to write (docs/images/playground.png)")
    args = parser.parse_args()
    take(args.url, args.classes).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
