"""`iddpm evaluate samples` of models that take conditioning images: generated image k has those of a real image."""

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
from typer.testing import CliRunner

from cli.main import app
from formats.checkpoint import write_checkpoint
from service.http.app import create_app
from service.settings import Settings
from tests.fakes import CLASS_NAMES, tiny_checkpoint, tiny_config, tiny_guided_checkpoint, tiny_network
from tests.integration.exact_service import serving
from tests.unit.trainer.evaluation.test_extractors import onnx_means
from tests.waiting import PATIENCE_S
from trainer.evaluation.conditions import real_images

NUM = 6
LABELS = np.array([3, 1, 0, 0, 3, 2])
SMALL = np.random.default_rng(1).integers(0, 256, (NUM, 4, 4, 1), dtype=np.uint8)
IMAGES = SMALL.repeat(2, axis=1).repeat(2, axis=2)
"""Images whose area means are SMALL."""
MAPS = np.random.default_rng(2).uniform(0, 1000, (NUM, 8, 8, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditioned")
    trained = {"train_config": {"data": {"cond_range": [0, 1000]}}}
    config = tiny_config(cond_channels=2).replace(cond_range=(0, 1000), provenance=trained)
    write_checkpoint(folder / "maps", config, tiny_network(config).state_dict())
    tiny_checkpoint(folder / "upsampler", low_res_size=4)
    content: dict[str, Any] = {"images": IMAGES, "labels": LABELS, "classes": np.array(CLASS_NAMES)}
    np.savez(folder / "data.npz", cond=MAPS, **content)
    np.savez(folder / "others.npz", cond=MAPS / 2, **content)
    np.savez(folder / "alone.npz", **content)
    np.savez(folder / "values.npz", cond=MAPS, **{**content, "images": IMAGES / 255})
    np.savez(folder / "reference.npz", mu=np.zeros(1), sigma=np.eye(1))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(create_app(Settings(models=(folder / "maps", folder / "upsampler")))) as address:
        yield address


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.evaluate_samples.SHARD_SIZE", 4)


def evaluate(model: Path, out: Path, *arguments: str | Path | int, num: int = NUM) -> tuple[int, str]:
    features = onnx_means(out.parent / "means.onnx", ("n", 1, "h", "w"))
    options = ["--features", features, "--out", out, "--num", num, "--steps", 3, "--cache", out.parent / "cache"]
    result = CliRunner().invoke(app, ["evaluate", "samples", str(model), *map(str, [*options, *arguments])])
    return result.exit_code, " ".join(result.output.split())


def of_the_service(address: str, k: int, **fields: Any) -> npt.NDArray[np.uint8]:
    body = {"seed": 5, "image_index": k, "steps": 3, "format": "npy", **fields}
    answer = httpx.post(f"http://{address}/v1/generate", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["images"]
    pixels: npt.NDArray[np.uint8] = np.load(io.BytesIO(base64.b64decode(image["b64_json"])))
    return pixels


def npy(array: npt.NDArray[Any]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("name", ["maps", "upsampler"])
def test_image_k_has_condition_and_class_of_real_image_k_and_the_bytes_of_the_service(
    folder: Path, address: str, tmp_path: Path, name: str
) -> None:
    out, conds = tmp_path / "out", MAPS if name == "maps" else SMALL
    code, output = evaluate(folder / name, out, "--data", folder / "data.npz", "--seed", 5)
    assert code == 0, output
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == LABELS.tolist()
        for k in range(NUM):
            fields = {"model": name, "class": int(LABELS[k]), "cond": npy(conds[k])}
            assert np.array_equal(arrays["arr_0"][k].ravel(), of_the_service(address, k, **fields).ravel())
    results = json.loads((out / "results.json").read_text())
    assert results["sampling"]["classes"] == "data"
    assert results["conditions"]["images"] == NUM
    assert ("cond_sha256" in results["conditions"]) == (name == "maps")


def test_conditions_may_be_a_file_of_their_own_and_others_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate(folder / "maps", out, "--data", folder / "data.npz", num=3)[0] == 0
    code, output = evaluate(folder / "maps", out, "--data", folder / "others.npz", num=3)
    assert code == 1
    assert "holds images that were generated differently (conditions.sha256 was" in output
    np.save(tmp_path / "conds.npy", MAPS)
    options: list[str | Path] = ["--data", folder / "alone.npz", "--cond", tmp_path / "conds.npy"]
    code, output = evaluate(folder / "maps", tmp_path / "file", *options, num=3)
    assert code == 0, output
    with np.load(out / "samples.npz") as one, np.load(tmp_path / "file" / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"])
        assert one["arr_1"].tolist() == LABELS[[0, 2, 4]].tolist()


def test_fewer_images_are_spread_over_the_data_and_more_begin_again() -> None:
    assert real_images(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert real_images(4, 10).tolist() == [0, 2, 5, 7]
    assert real_images(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "plain")
    guided = tiny_guided_checkpoint(tmp_path / "guided", low_res_size=4, num_classes=None, null_class=False)
    maps, data = folder / "maps", folder / "data.npz"
    cases: list[tuple[Path, list[str | Path | int], str]] = [
        (maps, ["--reference", folder / "reference.npz"], "--data is required by a model with model.cond_channels"),
        (folder / "upsampler", ["--reference", folder / "reference.npz"], "by a model with model.low_res_size"),
        (maps, ["--data", data, "--classes", "balanced"], "--classes must be data, or absent"),
        (maps, ["--data", folder / "alone.npz"], "must contain the arrays 'cond'"),
        (plain, ["--data", data, "--cond", data], "--cond must be absent: the model takes no conditioning image"),
        (folder / "upsampler", ["--data", data, "--cond", data], "--cond must be absent"),
        (guided, ["--data", data, "--classifier-scale", 2], "--classifier-scale must be 0, or absent"),
        (plain, ["--data", folder / "values.npz"], "data.value_range"),
    ]
    for model, options, message in cases:
        code, output = evaluate(model, tmp_path / "out", *options)
        assert code == 1, output
        assert message in output
        assert not (tmp_path / "out").exists()


def test_classes_of_the_data_are_those_of_the_model_by_name(folder: Path, tmp_path: Path) -> None:
    names = np.array(CLASS_NAMES[::-1])
    np.savez(tmp_path / "turned.npz", images=IMAGES, labels=3 - LABELS, classes=names)
    plain = tiny_checkpoint(tmp_path / "plain")
    code, output = evaluate(plain, tmp_path / "out", "--data", tmp_path / "turned.npz", "--classes", "data")
    assert code == 0, output
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert sorted(arrays["arr_1"].tolist()) == sorted(LABELS.tolist())
