"""`iddpm evaluate`: images of our engine, scored against real ones; interrupted and continued."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from formats.generated_folder import GeneratedFolder
from tests.fakes import CLASS_NAMES, tiny_checkpoint
from tests.unit.trainer.evaluation.test_extractors import onnx_means
from trainer.evaluation.extractors import INCEPTION_SHA256

NUM = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.evaluate_samples.SHARD_SIZE", 4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "real.npz"
    labels = np.repeat([0, 1, 3], [10, 6, 4])
    images = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=labels, classes=np.array(CLASS_NAMES))
    return path


def evaluate(model: Path, out: Path, *arguments: str | Path, num: int = NUM) -> tuple[int, str]:
    features = onnx_means(out.parent / "means.onnx", ("n", 1, "h", "w"))
    options = ["--features", features, "--out", out, "--num", num, "--steps", 3, "--cache", out.parent / "cache"]
    result = CliRunner().invoke(app, ["evaluate", "samples", str(model), *map(str, [*options, *arguments])])
    return result.exit_code, " ".join(result.output.split())


def test_samples_are_those_of_the_engine_and_are_scored_against_the_data(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, output = evaluate(model, out, "--data", data, "--split-baseline", data, "--seed", "6")
    assert code == 0, output
    assert "| the model | 10 |" in output
    results = json.loads((out / "results.json").read_text())
    assert results["sampling"] == {"steps": 3, "sampler": "ancestral", "seed": 6, "classes": "balanced"}
    assert [row["images"] for row in results["results"]] == [10, 10]
    assert results["results"][0]["frechet_distance"] > 0
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")

    alone = tmp_path / "alone.npz"
    options = ["--class", "Bee", "-n", "1", "--steps", "3", "--seed", "6", "--image-index", "5", "--out", str(alone)]
    assert CliRunner().invoke(app, ["sample", "--model", str(model), *options]).exit_code == 0
    with np.load(out / "samples.npz") as all_images, np.load(alone) as one:
        assert all_images["arr_0"].shape == (NUM, 8, 8, 1)
        assert all_images["arr_1"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
        assert np.array_equal(all_images["arr_0"][5], one["arr_0"][0])


def test_an_interrupted_command_continues_with_the_missing_images(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = GeneratedFolder.write
    written: list[range] = []

    def killed_at_the_second(self: GeneratedFolder, images: range, pixels: np.ndarray) -> None:
        if len(written) == 1:
            raise OSError("killed")
        written.append(images)
        write(self, images, pixels)

    monkeypatch.setattr(GeneratedFolder, "write", killed_at_the_second)
    assert evaluate(model, tmp_path / "out", "--data", data)[0] == 1
    assert len(written) == 1

    def count(self: GeneratedFolder, images: range, pixels: np.ndarray) -> None:
        written.append(images)
        write(self, images, pixels)

    monkeypatch.setattr(GeneratedFolder, "write", count)
    assert evaluate(model, tmp_path / "out", "--data", data)[0] == 0
    assert sorted(images.start for images in written) == [0, 4, 8]
    assert evaluate(model, tmp_path / "whole", "--data", data)[0] == 0
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()

    code, output = evaluate(model, tmp_path / "out", "--data", data, "--seed", "1")
    assert code == 1
    assert "seed was 0, is 1" in output


def test_classes_have_the_frequencies_of_the_data_when_asked(model: Path, data: Path, tmp_path: Path) -> None:
    code, output = evaluate(model, tmp_path / "out", "--data", data, "--classes", "data")
    assert code == 0, output
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert np.bincount(arrays["arr_1"], minlength=4).tolist() == [5, 3, 0, 2]


def test_real_images_are_read_with_the_options_that_are_set(model: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(200, 256, (4, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=images)
    distances = []
    for arguments in ([], ["--set", "data.small_images=enlarge"]):  # without the option, in black frames
        code, output = evaluate(model, tmp_path / "out", "--data", tmp_path / "real.npz", *arguments, num=2)
        assert code == 0, output
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
        distances.append(row["frechet_distance"])
    assert distances[0] != pytest.approx(distances[1], rel=0.1)


def test_samples_are_scored_against_a_reference_file(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(1), sigma=np.eye(1))
    code, output = evaluate(model, tmp_path / "out", "--reference", tmp_path / "reference.npz")
    assert code == 0, output
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert set(row) == {"name", "images", "frechet_distance"}


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "either --data or --reference"),
    (["--data", "x", "--reference", "y"], "either --data or --reference"),
    (["--reference", "y", "--classes", "data"], "--classes data needs --data"),
    (["--reference", "y", "--features-range", "0"], "--features-range must be BLACK,WHITE"),
    (["--reference", "y", "--steps", "1001"], "1000"),
    (["--reference", "y", "--features", "absent.pth"], INCEPTION_SHA256),
    (["--reference", "y", "--set", "model.dropout=0"], "--set takes options of the data here"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    arguments: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    code, output = evaluate(model, tmp_path / "out", *arguments)
    assert code == 1
    assert message in output.replace("\n", "")
    assert not (tmp_path / "out").exists()
