"""Everything on docs/given-images.md runs, with few steps and a tiny model of the bundled model's shape."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.given_pictures import PAGE, ROOT, SERVED_AT, blocks_of, draw, run_page
from cli.main import app
from diffusion.config import DiffusionConfig
from formats.checkpoint import write_checkpoint
from tests.denoisers import ExactDenoiser
from tests.fakes import tiny_config, tiny_network
from tests.integration.exact_service import exact_app, serving

NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_TINY = tiny_config(image_size=32, attention_resolutions=())
CONFIG = _TINY.replace(
    model=_TINY.model.replace(num_classes=len(NAMES)).model_dump(),
    diffusion=DiffusionConfig(num_timesteps=4000, noise_schedule="cosine").model_dump(),
    class_names=NAMES,
)


def test_every_block_of_the_page_runs_and_its_pictures_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDDPM_MAX_ROWS", "2")  # each command warms up fewer sizes
    model, folder = tmp_path / "model", tmp_path / "page"
    write_checkpoint(model, CONFIG, tiny_network(CONFIG).state_dict())
    folder.mkdir()
    written: list[Path] = []

    def command(arguments: list[str]) -> None:
        text = " ".join(arguments)
        assert "--model models/fashion32" in text
        few = [str(model) if word == "models/fashion32" else word for word in arguments]
        few = few if "--steps" in few else [*few, "--steps", "3"]
        few[few.index("--steps") + 1] = "3"
        result = CliRunner().invoke(app, few)
        assert result.exit_code == 0, f"{text}: {result.output}"
        written.append(folder / arguments[arguments.index("-o") + 1])

    page = PAGE.read_text(encoding="utf-8")
    with serving(exact_app(ExactDenoiser(CONFIG))) as address:
        run_page(page, folder, command, f"http://{address}")
    assert len(written) == sum(len(block.commands) for block in blocks_of(page) if block.language == "sh") > 9
    assert all(path.is_file() for path in written)
    plain = np.load(folder / "given" / "plain.npy")
    with Image.open(ROOT / "docs" / "images" / "given" / "shirt.png") as picture:
        assert np.array_equal(
            plain[..., :16, 0], np.broadcast_to(np.asarray(picture)[:, :16], plain[..., :16, 0].shape)
        )
    shown = re.findall(r"\(images/given_(\w+)\.png\)", page)
    assert sorted(draw(folder)) == sorted(shown)


def test_the_page_names_one_service_and_shells_and_python_only() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert {block.language for block in blocks_of(page)} == {"sh", "python"}
    assert set(re.findall(r"http://[\d.]+:\d+", page)) == {SERVED_AT}


@pytest.mark.parametrize("name", ["boot.png", "shirt.png", "damaged.png", "right.png"])
def test_the_given_pictures_have_the_bundled_models_shape(name: str) -> None:
    with Image.open(ROOT / "docs" / "images" / "given" / name) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "L")
