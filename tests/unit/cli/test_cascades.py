"""`iddpm sample` and `iddpm generate` of a cascade, and conditioning images: the bytes of a service that serves it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from service.http.app import create_app
from service.settings import Settings
from tests.fakes import tiny_checkpoint, tiny_guided_checkpoint
from tests.integration.exact_service import serving
from tests.waiting import PATIENCE_S

CASCADE = "large=small+up"
BASE = ("--steps", "4", "--cfg-scale", "1.5", "--seed", "6")
LATER = ("--upsample-steps", "3", "--upsample-sampler", "dpm++", "--upsample-cfg-scale", "2.5")
BODY: dict[str, Any] = {
    "model": "large",
    "steps": 4,
    "cfg_scale": 1.5,
    "seed": 6,
    "upsample": {"steps": 3, "sampler": "dpm++", "cfg_scale": 2.5},
    "format": "npy",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    small = tiny_checkpoint(folder / "small", image_size=4, attention_resolutions=())
    return small, tiny_checkpoint(folder / "up", low_res_size=4)


@pytest.fixture(scope="module")
def url(models: tuple[Path, Path]) -> Iterator[str]:
    with serving(create_app(Settings(models=models, cascades=(CASCADE,)))) as address:
        yield f"http://{address}"


def served(url: str, **body: Any) -> npt.NDArray[Any]:
    answer = httpx.post(f"{url}/v1/generate", json=BODY | body, timeout=PATIENCE_S).raise_for_status().json()
    files = [base64.b64decode(image["b64_json"]) for image in answer["images"]]
    return np.concatenate([np.load(io.BytesIO(file)) for file in files])


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def here(models: tuple[Path, ...]) -> list[object]:
    return [*(part for model in models for part in ("--model", model)), "--cascade", CASCADE]


def test_sample_gives_the_bytes_of_the_service(models: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    options = [*BASE, *LATER, "--class", "bee", "-n", 3, "--image-index", 2, "--dtype", "float32"]
    said = set()
    for name, place in (("here.npy", here(models)), ("there.npy", ["--url", url, "--model", "large"])):
        code, output = run("sample", *place, *options, "-o", tmp_path / name)
        assert code == 0, output
        said.add(output[output.index("seed 6") : output.index(" wrote")])
    assert (tmp_path / "here.npy").read_bytes() == (tmp_path / "there.npy").read_bytes()
    assert len(said) == 1  # equal numerics_ids
    answer = served(url, **{"class": "bee", "n": 3, "image_index": 2, "dtype": "float32"})
    np.testing.assert_array_equal(np.load(tmp_path / "here.npy"), answer)
    assert answer.shape == (3, 8, 8, 1)


def test_guided_stages_give_the_bytes_of_the_service_and_of_both_models_run_by_hand(tmp_path: Path) -> None:
    """Classifier guidance of the base (ADM-G) and of the upsampler (ADM-U), arXiv:2105.05233."""
    small = tiny_guided_checkpoint(tmp_path / "small", image_size=4, attention_resolutions=())
    folders = (small, tiny_guided_checkpoint(tmp_path / "up", low_res_size=4))
    plain = ["--class", "bee", "-n", 2, "--cfg-scale", "1"]
    options = [*plain, "--seed", 6, "--steps", 4, "--classifier-scale", "4"]
    later = ["--upsample-steps", 3, "--upsample-cfg-scale", 1, "--upsample-classifier-scale", "2"]

    def sampled(*arguments: object) -> npt.NDArray[Any]:
        code, output = run("sample", *arguments, "-o", tmp_path / "out.npy")
        assert code == 0, output
        return np.asarray(np.load(tmp_path / "out.npy"))

    found = sampled(*here(folders), *options, *later)
    with serving(create_app(Settings(models=folders, cascades=(CASCADE,)))) as address:
        url = f"http://{address}"
        np.testing.assert_array_equal(found, sampled("--url", url, "--model", "large", *options, *later))
        first = {"cfg_scale": 1, "classifier_scale": 4, "class": "bee", "n": 2}
        upsample = {"steps": 3, "cfg_scale": 1, "classifier_scale": 2}
        np.testing.assert_array_equal(found, served(url, **first, upsample=upsample))
        unguided = served(url, **first, upsample=upsample | {"classifier_scale": 0})
    np.save(tmp_path / "base.npy", sampled("--model", small, *options))
    up = ["--model", folders[1], *plain, "--cond", tmp_path / "base.npy", "--seed", 7, "--steps", 3]
    np.testing.assert_array_equal(found, sampled(*up, "--classifier-scale", "2"))
    assert not np.array_equal(found, unguided)


def test_more_images_than_a_request_holds_begin_with_a_given_one(
    models: tuple[Path, Path], url: str, tmp_path: Path
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 1), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", picture)
    options = ["--image", tmp_path / "picture.npy", "--strength", "0.5", "--class", 1, "-n", 66, *BASE, *LATER]
    code, output = run("sample", *here(models), *options, "-o", tmp_path / "all.npy")
    assert code == 0, output
    found = np.load(tmp_path / "all.npy")
    assert len(found) == 66
    image = base64.b64encode((tmp_path / "picture.npy").read_bytes()).decode()
    given = {"image": image, "strength": 0.5, "class": 1}
    np.testing.assert_array_equal(found[64:], served(url, **given, n=2, image_index=64))


def test_by_default_the_upsampler_takes_25_steps(models: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    code, output = run("sample", *here(models), "--class", 0, *BASE, "-o", tmp_path / "x.npy")
    assert code == 0, output
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), served(url, **{"class": 0, "upsample": None}))


def test_generate_gives_the_bytes_of_the_service(models: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    options = ["--num", 9, "--class", "cat", "--class", "ape", "--shard-size", 4, "--image-index", 5]
    command = ["generate", *models, "--cascade", CASCADE, *BASE, *options, "--format", "npz", "-o", tmp_path / "out"]
    code, output = run(*command, *LATER)
    assert code == 0, output
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    classes = [[2, 0][index % 2] for index in range(5, 14)]
    assert labels.tolist() == classes
    np.testing.assert_array_equal(images, served(url, **{"class": classes, "image_index": 5}))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["model"], manifest["image_shape"]) == ("large", [8, 8, 1])
    later = manifest["upsampling"]
    assert (later["model"], later["sampling"]["sampler"], later["sampling"]["cfg_scale"]) == ("up", "dpm++", 2.5)
    assert later["model_sha256"] != manifest["model_sha256"]
    code, output = run(*command, "--upsample-steps", 5)
    assert (code, "upsampling.sampling.respacing was" in output) == (1, True)


@pytest.mark.parametrize("name", ["small.png", "one.npy", "three.npz"])
@pytest.mark.parametrize("command", ["sample", "encode"])
def test_conditioning_images_give_equal_bytes_with_and_without_a_server(
    models: tuple[Path, Path], url: str, tmp_path: Path, command: str, name: str
) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    Image.fromarray(small[0, ..., 0]).save(tmp_path / "small.png")
    np.save(tmp_path / "one.npy", small[1].astype(np.float32) + 0.5)
    np.savez(tmp_path / "three.npz", small)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    options: list[object] = ["--cond", tmp_path / name, "--class", 1, "--steps", 4]
    options += ["--seed", 6] if command == "sample" else [tmp_path / "images.npy"]
    for place in (["--model", models[1]], ["--url", url, "--model", "up"]):
        code, output = run(command, *place, *options, "-o", tmp_path / f"{place[0]}.npy")
        assert code == 0, output
    assert (tmp_path / "--model.npy").read_bytes() == (tmp_path / "--url.npy").read_bytes()
    assert len(np.load(tmp_path / "--url.npy")) == (1 if command == "sample" and name != "three.npz" else 3)


@pytest.mark.parametrize("command", [("sample",), ("generate", "--num", 1)])
@pytest.mark.parametrize(
    ("given", "cascade", "message"),
    [
        ((0, 1), None, "--model: up would not be run: give one model, or two and --cascade NAME=BASE+UPSAMPLER"),
        ((0,), CASCADE, "no model is named 'up'; the models are small"),
        ((0, 1), "up+small", "must be NAME=BASE+UPSAMPLER, of two models"),
        ((0, 1), "large=up+small", '"small" is not an upsampler'),
    ],
)
def test_models_that_make_no_cascade_are_refused(
    models: tuple[Path, Path],
    tmp_path: Path,
    command: tuple[str, ...],
    given: tuple[int, ...],
    cascade: str | None,
    message: str,
) -> None:
    folders = [models[k] for k in given]
    named = folders if command[0] == "generate" else [part for folder in folders for part in ("--model", folder)]
    options = () if cascade is None else ("--cascade", cascade)
    code, output = run(*command, *named, *options, "-o", tmp_path / "out")
    assert (code, message in output) == (1, True), output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://127.0.0.1:1", "--cascade", CASCADE], "--cascade is valid only without --url"),
        (["--url", "http://127.0.0.1:1", "--model", "a", "--model", "b"], "--model: with --url, one name; got a, b"),
    ],
)
def test_a_service_has_its_own_cascades(tmp_path: Path, options: list[str], message: str) -> None:
    code, output = run("sample", *options, "-o", tmp_path / "x.png")
    assert (code, message in output) == (1, True), output


def test_one_model_has_no_second_stage(models: tuple[Path, Path], tmp_path: Path) -> None:
    code, output = run("sample", "--model", models[0], "--upsample-steps", 5, "-o", tmp_path / "x.png")
    assert (code, "upsample: is valid only for a cascade" in output) == (1, True), output
