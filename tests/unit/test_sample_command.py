"""`iddpm sample` gives the pixels of the service, in the files that were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from tests.fakes import tiny_checkpoint, tiny_config, tiny_network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def sample(model: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sample", "--model", str(model), *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_images_equal_the_one_image_sampler(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.npz"
    code, output = sample(model, "--class", "bee", "-n", "3", "--steps", "4", "--seed", "6", "--out", str(out))
    assert code == 0, output
    config = tiny_config()
    plan = build_plan(config.diffusion, "ancestral", "4")
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [1, 1, 1]
        for index, pixels in enumerate(arrays["arr_0"]):
            spec = ImageSpec(seed=6, image_index=index, class_index=1, cfg_scale=config.sampling.cfg_scale)
            assert np.array_equal(pixels, sample_images(tiny_network(config), plan, [spec])[0])


def test_a_folder_gets_one_file_per_image(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    code, output = sample(model, "-n", "70", "--steps", "2", "--seed", "6", "--cfg-scale", "1", "--out", str(out))
    assert (code, "wrote 70 images" in output) == (0, True)
    assert {path.name for path in out.iterdir()} == {f"6_{index}.png" for index in range(70)}
    with Image.open(out / "6_69.png") as picture:
        assert picture.size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "Dog"], "error: class: must be one of Ape, Bee, Cat, T-shirt/top; got 'Dog'"),
        (["--steps", "1001"], "error: steps: must be 2..1000"),
        (["--sampler", "euler"], "error: sampler: Input should be 'ancestral' or 'ddim'"),
        (["--seed", "-1"], "error: seed:"),
        (["--model", "/nonexistent"], "has no config.json"),
    ],
)
def test_mistakes_end_in_one_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = sample(model, "--out", str(tmp_path / "x.png"), *arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output
