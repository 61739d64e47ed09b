"""`iddpm encode`, and back with `iddpm sample --latent`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from diffusion.arrays import to_numpy
from diffusion.chains import Chain, build_chain, encoding_end
from diffusion.sampling import ImageSpec, sample_values
from diffusion.update import from_uint8_reversibly
from tests.fakes import tiny_checkpoint, tiny_config, tiny_network

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, " ".join(result.output.split())


def test_latents_equal_the_one_image_sampler(model: Path, picture: Path, tmp_path: Path) -> None:
    config = tiny_config()
    chain = Chain(kind="encode", spec="5", timestep=600)
    options = ("--class", "1", "--steps", "5", "--end-timestep", "600")
    spec = ImageSpec(seed=0, class_index=1, given=from_uint8_reversibly(PIXELS[None])[0])
    values = to_numpy(sample_values(tiny_network(config), build_chain(config.diffusion, chain), [spec]))
    for name in ("latent.npy", "latent.npz"):
        code, output = run("encode", str(picture), "--model", str(model), *options, "-o", str(tmp_path / name))
        assert code == 0, output
        assert f"timestep {encoding_end(config.diffusion, chain)}, numerics_id" in output
    latents = np.load(tmp_path / "latent.npy")
    assert latents.dtype == np.float32
    assert np.array_equal(latents, values.transpose(0, 2, 3, 1))
    with np.load(tmp_path / "latent.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], latents)


def test_several_images_are_encoded_and_come_back(model: Path, tmp_path: Path) -> None:
    images = np.stack([PIXELS, PIXELS.transpose(1, 0, 2)])
    np.save(tmp_path / "two.npy", images)
    latent, back = tmp_path / "latent.npy", tmp_path / "back.npy"
    common = ("--model", str(model), "--steps", "250", "--class", "bee")
    code, output = run(
        "encode", str(tmp_path / "two.npy"), *common, "--no-clip", "--end-timestep", "300", "-o", str(latent)
    )
    assert code == 0, output
    timestep = output.partition("timestep ")[2].partition(",")[0]
    decode = ("--sampler", "ddim", "--cfg-scale", "1", "--no-clip", "--start-timestep", timestep)
    code, output = run("sample", "--latent", str(latent), *common, *decode, "-o", str(back))
    assert code == 0, output
    assert np.abs(np.load(back).astype(int) - images).mean() < 4
    assert np.abs(np.load(latent) - images / 127.5 + 1).mean() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "latent.png"], "--out: must be a file that ends in .npy or .npz; got latent.png"),
        (["--steps", "1001"], "steps: must be 2..1000, the model's timesteps; got 1001"),
        (["--end-timestep", "1000"], "end_timestep: must be 0..999; got 1000"),
        (["--class", "Dog"], 'class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'),
        (["--model", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_invalid_arguments_end_with_one_line(
    model: Path, picture: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    latent = str(tmp_path / "latent.npy")
    code, output = run("encode", str(picture), "--model", str(model), "--out", latent, *arguments)
    assert (code, f"error: {message}" in output) == (1, True), output
    code, output = run("encode", str(tmp_path / "none.png"), "--model", str(model), "--out", latent)
    assert (code, "none.png is not there" in output) == (1, True)
