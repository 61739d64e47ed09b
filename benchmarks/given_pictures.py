"""Make the pictures of docs/given-images.md anew: run what is on that page, and draw the results.

    python -m benchmarks.given_pictures

With `--data fashion_mnist_test.npz` (images uint8 [n, 28, 28, 1], labels), the given pictures are made anew before.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.processes import end_session, free_ports
from formats.images import captioned_rows

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "given-images.md"
SERVED_AT = "http://127.0.0.1:8000"
"""Address of the service in the page's examples."""
SCALE = 3
GREY = 128
"""Of pixels that are to be made."""
START_SECONDS = 180.0

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a block of shell commands."""
        return [shlex.split(line, comments=True) for line in self.code.splitlines() if line.strip()]


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page in Markdown."""
    return [Block(language, code) for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.M)]


def run_page(text: str, folder: Path, command: Callable[[list[str]], object], url: str) -> None:
    """Run all blocks of a page, one after the other.

    Args:
        text: of the page.
        folder: empty; the blocks run there, with the repository's `docs` and `models`.
        command: runs `iddpm` with arguments.
        url: of a service, in place of the one that the page names.
    """
    for name in ("docs", "models"):
        (folder / name).symlink_to(ROOT / name)
    with chdir(folder):
        for block in blocks_of(text):
            if block.language == "python":
                exec(block.code.replace(SERVED_AT, url), {})  # noqa: S102  # the page is ours
                continue
            for program, *arguments in block.commands:
                assert program == "iddpm", program
                command(arguments)


def make_given(data: Path, out: Path) -> None:
    """Make the given pictures from Fashion-MNIST's test set."""
    with np.load(data, allow_pickle=False) as arrays:
        images, labels = arrays["images"][..., 0], arrays["labels"]

    def nth(label: int, number: int) -> Array:
        return np.pad(images[np.flatnonzero(labels == label)[number]], 2)

    rows, columns = np.mgrid[:32, :32]
    damaged = nth(2, 8)
    damaged[(rows - 17) ** 2 + (columns - 13) ** 2 < 7] = 10
    right = np.where(columns < 16, 0, 255)
    distance = np.hypot(rows - 15.5, columns - 15.5)
    ring = np.where((distance > 7) & (distance < 11), 220, 0)
    board = np.where((rows // 4 + columns // 4) % 2 == 0, 200, 0)
    sneakers = [nth(7, number) for number in (2, 3, 6, 10)]
    suspects = np.stack([*sneakers, nth(8, 4), sneakers[0][::-1], ring, board])
    pictures = {"boot": nth(9, 4), "shirt": nth(0, 3), "damaged": damaged, "right": right}
    for name, pixels in pictures.items():
        Image.fromarray(pixels.astype(np.uint8)).save(out / f"{name}.png")
    np.save(out / "suspects.npy", suspects.astype(np.uint8)[..., None])


def draw(folder: Path) -> dict[str, Image.Image]:
    """Draw the results of the page.

    Args:
        folder: where `run_page` ran.

    Returns:
        Pictures by name.
    """

    def given(name: str) -> Array:
        return np.asarray(Image.open(ROOT / "docs" / "images" / "given" / name))[None, ..., None]

    def made(name: str) -> Array:
        array: Array = np.load(folder / "given" / name)
        return array

    def apart(picture: Array, images: Array) -> Array:
        return np.abs(images.astype(np.float32) - picture).mean(axis=0, keepdims=True)

    suspects = np.load(ROOT / "docs" / "images" / "given" / "suspects.npy")
    back = [made(f"back_{seed}.npy") for seed in (1, 2)]
    boot, shirt, damaged = given("boot.png"), given("shirt.png"), given("damaged.png")
    other, healed = made("other.npy"), made("healed.npy")
    noisy, seen = np.clip((made("seen.npy") + 1) * 127.5, 0, 255)
    rows: dict[str, list[tuple[str, Array]]] = {
        "editing": [
            ("given", boot),
            *((f"strength 0.{part}", made(f"edited_{part}0.npy")) for part in (3, 6, 9)),
        ],
        "inpainting": [
            ("given, to be made", np.concatenate([shirt, np.where(given("right.png") > 0, GREY, shirt)])),
            ("without resampling", made("plain.npy")),
            ("resampled 5,10", made("resampled.npy")),
        ],
        "anomaly": [
            ("given, from noise, map", np.concatenate([damaged, healed[:1], 2 * apart(damaged, healed)])),
            ("given, decoded, map", np.concatenate([boot, other, 2 * apart(boot, other)])),
        ],
        "reconstruction": [
            ("given", suspects),
            ("comes back", back[0]),
            ("distance, x2", np.mean([2 * np.abs(found - suspects) for found in back], axis=0)),
        ],
        "network": [("x_t", noisy), ("prediction of x_0", seen)],
    }
    return {
        name: captioned_rows([(caption, _drawable(images)) for caption, images in named], SCALE).convert("L")
        for name, named in rows.items()
    }


def _drawable(images: Array) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(images, 0, 255)).astype(np.uint8)


@contextmanager
def service(*arguments: object) -> Iterator[str]:
    """Run `iddpm serve` with arguments, and yield its URL when it is ready."""
    port = free_ports()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "cli.main", "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    try:
        begun = time.monotonic()
        while not _ready(url):
            assert process.poll() is None, "the service ended"
            assert time.monotonic() < begun + START_SECONDS, "the service did not start"
            time.sleep(0.2)
        yield url
    finally:
        end_session(process)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).is_success
    except httpx.TransportError:
        return False


def _iddpm(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=True, env=environment)  # noqa: S603


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.given_pictures", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, help="Fashion-MNIST's test set, to make the given pictures anew")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (docs/images)")
    args = parser.parse_args()
    if args.data is not None:
        make_given(args.data, ROOT / "docs" / "images" / "given")
    with tempfile.TemporaryDirectory() as name, service("--model", ROOT / "models" / "fashion32") as url:
        run_page(PAGE.read_text(encoding="utf-8"), Path(name), _iddpm, url)
        for picture, image in draw(Path(name)).items():
            path = args.out / f"given_{picture}.png"
            image.save(path, optimize=True)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
