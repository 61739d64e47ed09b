"""`iddpm sample` with given images, masks and latents, and with arrays of values as the output."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from cli.split_requests import split_requests
from diffusion.arrays import to_numpy
from diffusion.chains import Chain, Resample, build_chain
from diffusion.sampling import ImageSpec, sample_values
from diffusion.update import from_uint8_reversibly, to_uint8
from formats.value_range import value_range_of
from tests.fakes import tiny_checkpoint, tiny_config, tiny_network

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[2:6, 3:] = 255
LATENT = RNG.standard_normal((8, 8, 1)).astype(np.float32)
OPTIONS = ("--class", "bee", "--steps", "4", "--seed", "6")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    Image.fromarray(PIXELS[..., 0]).save(folder / "image.png")
    Image.fromarray(MASK).save(folder / "mask.png")
    Image.fromarray(np.zeros((6, 12), np.uint8)).save(folder / "wide.png")
    np.save(folder / "latent.npy", LATENT)
    np.save(folder / "three.npy", np.stack([PIXELS, 255 - PIXELS, PIXELS.transpose(1, 0, 2)]))
    (folder / "empty.png").touch()
    return folder


def sample(model: Path, files: Path, *arguments: str) -> tuple[int, str]:
    """Run the command; names of files in `files` become paths."""
    paths = [str(files / text) if (files / text).exists() and text else text for text in arguments]
    result = CliRunner().invoke(app, ["sample", "--model", str(model), *OPTIONS, *paths])
    return result.exit_code, " ".join(result.output.split())


def alone(chain: Chain, given: Any = None, *, masked: bool = False, index: int = 0) -> Any:
    """Sample one image without an engine; return the values of the network, [C, H, W]."""
    config = tiny_config()
    spec = ImageSpec(
        seed=6,
        image_index=index,
        class_index=1,
        cfg_scale=config.sampling.cfg_scale,
        given=given,
        mask=(MASK[None] / np.float32(255)).astype(np.float32) if masked else None,
    )
    return to_numpy(sample_values(tiny_network(config), build_chain(config.diffusion, chain), [spec]))[0]


IMAGE = from_uint8_reversibly(PIXELS[None])[0]


@pytest.mark.parametrize(
    ("options", "chain", "given", "masked"),
    [
        (("--image", "image.png", "--strength", "0.5"), {"strength": 0.5}, IMAGE, False),
        (
            ("--image", "image.png", "--start-timestep", "500", "--sampler", "dpm++"),
            {"timestep": 500, "sampler": "dpm++"},
            IMAGE,
            False,
        ),
        (
            ("--image", "image.png", "--mask", "mask.png", "--resample", "2,2"),
            {"resample": Resample(2, 2)},
            IMAGE,
            True,
        ),
        (
            ("--latent", "latent.npy", "--sampler", "ddim", "--no-clip"),
            {"from_latent": True, "sampler": "ddim", "clip": False},
            LATENT.transpose(2, 0, 1),
            False,
        ),
    ],
)
def test_given_images_equal_the_one_image_sampler(
    model: Path, files: Path, tmp_path: Path, options: tuple[str, ...], chain: dict[str, Any], given: Any, masked: bool
) -> None:
    values = alone(Chain(**{"spec": "4"} | chain), given, masked=masked)
    code, output = sample(model, files, *options, "--out", str(tmp_path / "x.png"))
    assert code == 0, output
    with Image.open(tmp_path / "x.png") as picture:
        assert np.array_equal(np.asarray(picture), to_uint8(values[None])[0, ..., 0])
    code, output = sample(model, files, *options, "--dtype", "float32", "--out", str(tmp_path / "x.npy"))
    assert code == 0, output
    expected = value_range_of(tiny_config()).to_data(values)
    if masked:
        expected = np.where(MASK[..., None] == 0, PIXELS.astype(np.float32), expected)
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.float32
    assert np.array_equal(found, expected[None])


def test_there_are_as_many_images_as_are_given(model: Path, files: Path, tmp_path: Path) -> None:
    options = ("--image", "three.npy", "--strength", "0.5")
    code, output = sample(model, files, *options, "--out", str(tmp_path / "all.npz"))
    assert code == 0, output
    with np.load(tmp_path / "all.npz") as arrays:
        found = arrays["arr_0"]
    for index, image in enumerate(from_uint8_reversibly(np.load(files / "three.npy"))):
        values = alone(Chain(spec="4", strength=0.5), image, index=index)
        assert np.array_equal(found[index], to_uint8(values[None])[0])
    code, output = sample(model, files, *options, "-n", "2", "--out", str(tmp_path / "two.npz"))
    assert (code, "image: must hold 1 or 2 arrays; got 3" in output) == (1, True)


def test_one_image_may_begin_more_chains_than_a_request_holds(model: Path, files: Path, tmp_path: Path) -> None:
    options = ("--image", "image.png", "--strength", "0", "-n", "66")
    code, output = sample(model, files, *options, "--out", str(tmp_path / "all.npy"))
    assert code == 0, output
    assert np.array_equal(np.load(tmp_path / "all.npy"), np.repeat(PIXELS[None], 66, axis=0))


def test_given_arrays_never_begin_other_chains_than_their_own(model: Path, files: Path, tmp_path: Path) -> None:
    options = ("--image", "three.npy", "--strength", "0", "-n", "192")
    code, output = sample(model, files, *options, "--out", str(tmp_path / "all.npy"))
    assert (code, "error: image: must hold 1 or 192 arrays; got 3" in output) == (1, True)
    np.save(tmp_path / "grey.npy", np.zeros((64, 8, 8), np.float32))
    options = ("--image", str(tmp_path / "grey.npy"), "--strength", "0", "-n", "128")
    code, output = sample(model, files, *options, "--out", str(tmp_path / "all.npy"))
    assert (code, "given files must hold one array with more than 64 images; they hold 64" in output) == (1, True)


def in_base64(save: Callable[..., object], *arrays: Any) -> str:
    file = io.BytesIO()
    save(file, *arrays)
    return base64.b64encode(file.getvalue()).decode()


def damaged_npz() -> str:
    file = io.BytesIO()
    np.savez_compressed(file, np.arange(1000))
    content = bytearray(file.getvalue())
    content[60:80] = bytes(20)
    return base64.b64encode(content).decode()


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_each_request_gets_the_arrays_of_its_images(save: Callable[..., object]) -> None:
    stack = np.arange(5 * 4, dtype=np.float32).reshape(5, 2, 2, 1)
    one = in_base64(np.save, MASK)
    params = {"seed": 1, "latent": in_base64(save, stack), "mask": one, "cond": "no base64!", "image": damaged_npz()}
    requests = list(split_requests(params, 5, 2, list))
    assert [(r["n"], r["image_index"], r["mask"], r["cond"]) for r in requests] == [
        (n, index, one, "no base64!") for n, index in ((2, 0), (2, 2), (1, 4))
    ]
    sent = [np.load(io.BytesIO(base64.b64decode(request["latent"]))) for request in requests]
    assert np.array_equal(np.concatenate(sent), stack)
    masks = {"seed": 1, "mask": in_base64(save, stack[..., 0]), "image": in_base64(save, stack[..., 0])}
    requests = list(split_requests(masks, 5, 2, list, {"mask"}))  # of `image`, the last axis may be channels
    sent = [np.load(io.BytesIO(base64.b64decode(request["mask"]))) for request in requests]
    assert np.array_equal(np.concatenate(sent), stack[..., 0])
    assert {request["image"] for request in requests} == {masks["image"]}
    (whole,) = split_requests(params, 5, 5, list)
    assert whole["latent"] == params["latent"]
    with pytest.raises(ValueError, match=r"^latent: must hold 1 or 10 arrays; got 5$"):
        list(split_requests(params, 10, 5, list))


def test_a_folder_gets_files_of_the_format(model: Path, files: Path, tmp_path: Path) -> None:
    given = ("--image", "image.png", "--strength", "0")
    for options, suffix in (((), "png"), (("--format", "webp"), "webp"), (("--dtype", "float32"), "npy")):
        out = tmp_path / suffix
        code, output = sample(model, files, *given, *options, "--out", str(out))
        assert code == 0, output
        assert [path.name for path in out.iterdir()] == [f"6_0.{suffix}"]
    np.testing.assert_allclose(np.load(tmp_path / "npy" / "6_0.npy"), PIXELS[None].astype(np.float32), atol=1e-4)
    with Image.open(tmp_path / "webp" / "6_0.webp") as picture:
        assert np.array_equal(np.asarray(picture.convert("L")), PIXELS[..., 0])


def test_an_image_of_another_shape_is_fitted_if_that_is_wanted(model: Path, files: Path, tmp_path: Path) -> None:
    options = ("--image", "wide.png", "--strength", "0", "--out", str(tmp_path / "x.npy"))
    code, output = sample(model, files, *options)
    assert (code, "image: must be 8 pixels wide and 8 high; or set fit to" in output) == (1, True)
    code, output = sample(model, files, *options, "--fit", "crop")
    assert code == 0, output
    assert not np.load(tmp_path / "x.npy").any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "mask.png"], "mask: is valid only with `image`"),
        (["--strength", "0.5"], "strength: is valid only with `image`"),
        (["--image", "image.png"], "image: needs `strength`, `start_timestep` or `mask`"),
        (["--image", "image.png", "--strength", "1.5"], "strength: Input should be less than or equal to 1"),
        (["--image", "image.png", "--strength", "1", "--resample", "2,2"], "resample: is valid only with `mask`"),
        (["--image", "image.png", "--mask", "mask.png", "--resample", "2"], "--resample: must be TIMES,JUMP"),
        (["--image", "image.png", "--strength", "1", "--fit", "stretch"], "fit: Input should be 'crop', 'pad' or"),
        (["--image", "none.png", "--strength", "1"], "--image: none.png is not there"),
        (["--image", "/dev/zero", "--strength", "1"], "--image: /dev/zero is not a file"),
        (["--image", "empty.png", "--strength", "1"], "empty.png is empty"),
        (["--dtype", "float64"], '--dtype: must be "uint8" or "float32"; got "float64"'),
        (["--dtype", "float32"], '--dtype: float32 is valid only with "npz" or "npy"; got "png"'),
        (["--format", "webp"], '--format: is that of the file, "png", or name a folder; got "webp"'),
        (["--format", "gif"], '--format: must be "png", "webp", "jpeg", "npz" or "npy"; got "gif"'),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    tmp_path: Path, files: Path, arguments: list[str], message: str
) -> None:
    code, output = sample(tmp_path / "nowhere", files, *arguments, "--out", str(tmp_path / "x.png"))
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_wrong_files_are_refused_before_the_network_runs(
    model: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.engine.Engine.warm_up", None)
    monkeypatch.setattr("service.engine.engine.Engine.step", None)
    out = ("--out", str(tmp_path / "x.png"))
    code, output = sample(model, files, "--latent", "image.png", *out)
    assert (code, "latent: must be an npy or npz file of floating-point numbers" in output) == (1, True)
    code, output = sample(model, files, "--image", "image.png", "--mask", "wide.png", *out)
    assert (code, "mask: must be 8 pixels wide and 8 high" in output) == (1, True)
