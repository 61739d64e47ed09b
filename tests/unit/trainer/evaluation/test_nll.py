"""`iddpm evaluate nll`: equal numbers in any batch, after any interruption, and in a table with other models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import DiffusionConfig
from diffusion.likelihood import VariationalBound
from diffusion.noise import STREAM_EVALUATION, normal
from diffusion.respacing import respace
from formats.ensemble import write_ensemble
from formats.folder_lock import FolderInUse
from tests.fakes import tiny_checkpoint, tiny_config
from tests.networks import RANDOM_MODEL_STEPS, write_random_model
from trainer.data import Dataset, network_input, open_dataset
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.folder import EvaluationStopped, evaluation_folder
from trainer.evaluation.nll import NllOptions, NllTerms, chosen_images, evaluate_nll
from trainer.evaluation.subject import Subject, load_subject

IMAGES, STEPS = 12, RANDOM_MODEL_STEPS
CPU = torch.device("cpu")
OPTIONS = NllOptions(respacing="10", images=9, batch_size=7)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "test.npz"
    images = rng.integers(0, 256, (IMAGES, 4, 4, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=rng.integers(0, 3, IMAGES), classes=np.array(["x", "y", "z"]))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "a", seed=0)


def opened(data: Path, model: Path) -> tuple[Subject, Dataset]:
    return load_subject(model, CPU), open_dataset(data, 4, 1)


def assert_equal(ours: NllTerms, theirs: NllTerms) -> None:
    np.testing.assert_array_equal(ours.terms, theirs.terms)
    np.testing.assert_array_equal(ours.prior_bpd, theirs.prior_bpd)


def test_every_image_gets_the_terms_of_its_own_chain(data: Path, model: Path, tmp_path: Path) -> None:
    subject, dataset = opened(data, model)
    found = evaluate_nll(subject, dataset, OPTIONS, tmp_path / "terms")

    assert found.timesteps.tolist() == respace(subject.config.diffusion, "10").timestep_map.tolist()
    bound = VariationalBound.of(subject.config.diffusion, respace(subject.config.diffusion, "10"))
    for row, index in enumerate(chosen_images(dataset, OPTIONS)):
        x0 = torch.from_numpy(network_input(dataset.images(np.array([index]))))
        y = torch.tensor([["z", "y", "x"].index(dataset.class_names[dataset.labels[index]])])
        for s, t in enumerate(found.timesteps):
            key = [torch.tensor([value]) for value in (OPTIONS.seed, int(index), int(t))]
            noise = normal(key[0], key[1], key[2], STREAM_EVALUATION, subject.image_shape)
            terms = bound.terms(subject.networks[0], x0, y, torch.tensor([s]), noise)
            np.testing.assert_allclose(found.terms[row, :, s], torch.cat(terms), rtol=1e-3, atol=1e-5)
        assert found.prior_bpd[row] == pytest.approx(bound.prior_bpd(x0).item(), rel=1e-4, abs=1e-7)
    np.testing.assert_allclose(found.total_bpd, found.terms[:, 0].sum(axis=1) + found.prior_bpd, rtol=1e-6)


def test_an_interrupted_evaluation_continues_with_equal_numbers(data: Path, model: Path, tmp_path: Path) -> None:
    subject, dataset = opened(data, model)
    options = NllOptions(images=9, batch_size=7)  # 40 steps: a block is one image
    whole = evaluate_nll(subject, dataset, options, tmp_path / "whole")

    parts = tmp_path / "parts"
    for stops_after in (2, 3):
        calls = iter(range(100))
        with pytest.raises(EvaluationStopped):
            evaluate_nll(subject, dataset, options, parts, stop=lambda: next(calls) == stops_after)  # noqa: B023
        with parts.open("ab") as file:
            file.write(b"\1\2\3\4\5")  # a killed process leaves half a record
    counted: list[int] = []
    assert_equal(evaluate_nll(subject, dataset, options, parts, advance=counted.append), whole)
    assert counted[0] == 5 * STEPS
    assert sum(counted) == 9 * STEPS


def test_more_images_continue_what_is_there(data: Path, model: Path, tmp_path: Path) -> None:
    subject, dataset = opened(data, model)
    few, many = NllOptions(images=4), NllOptions(images=IMAGES)
    first = evaluate_nll(subject, dataset, few, tmp_path / "terms")
    grown = evaluate_nll(subject, dataset, many, tmp_path / "terms")
    assert_equal(grown, evaluate_nll(subject, dataset, many, tmp_path / "whole"))
    np.testing.assert_allclose(grown.total_bpd[:4], first.total_bpd, rtol=1e-4)
    assert sorted(chosen_images(dataset, many)) == list(range(IMAGES))


def test_the_batch_size_changes_rounding_only(data: Path, model: Path, tmp_path: Path) -> None:
    subject, dataset = opened(data, model)
    results = [
        evaluate_nll(subject, dataset, NllOptions(respacing="10", images=5, batch_size=size), tmp_path / str(size))
        for size in (3, 64)
    ]
    np.testing.assert_allclose(results[0].terms, results[1].terms, rtol=1e-3, atol=1e-5)


def test_an_ensemble_takes_each_term_from_the_network_of_its_timestep(data: Path, model: Path, tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "b", seed=1)
    ensemble = write_ensemble(tmp_path / "both", [(0, 10, other), (10, 30, model), (30, 0, other)])
    options = NllOptions(images=4, batch_size=7)
    found = []
    for folder in (model, other, ensemble.folder):
        subject, dataset = opened(data, folder)
        found.append(evaluate_nll(subject, dataset, options, tmp_path / folder.with_suffix(".f32").name))
    middle = (found[0].timesteps >= 10) & (found[0].timesteps < 30)
    np.testing.assert_allclose(found[2].terms[..., middle], found[0].terms[..., middle], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found[2].terms[..., ~middle], found[1].terms[..., ~middle], rtol=1e-3, atol=1e-5)


def test_the_command_compares_models_on_the_same_images(data: Path, model: Path, tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "run" / "model", seed=1, num_classes=None, class_names=None)
    out = tmp_path / "out"
    arguments = ["evaluate", "nll", str(model), str(other), "--data", str(data), "--out", str(out)]
    arguments += ["--steps", "5", "--extra-steps", "--num", "6"]
    done = CliRunner().invoke(app, [*arguments, "--plot"])
    assert done.exit_code == 0, done.output

    content = json.loads((out / "results.json").read_text())
    first, second = content["models"]
    assert (first["name"], second["name"], content["images"]) == ("a", "run", 6)
    assert first["timesteps"] == sorted({*range(8), *respace(DiffusionConfig(num_timesteps=STEPS), "5").timestep_map})
    parts = sum(first["vb_bpd"]["mean"]) + first["prior_bpd"]["mean"]
    assert first["total_bpd"]["mean"] == pytest.approx(parts, rel=1e-5)
    assert second["difference_to_first"]["mean"] == pytest.approx(
        second["total_bpd"]["mean"] - first["total_bpd"]["mean"], rel=1e-5
    )
    assert first["total_bpd"]["std_error"] > 0
    for text in ("a ", "run ", f"{first['total_bpd']['mean']:.4f}"):
        assert text in done.output
    with Image.open(out / "vlb_terms.png") as picture:
        assert picture.width > 100

    again = CliRunner().invoke(app, arguments)
    assert json.loads((out / "results.json").read_text()) == content
    assert again.exit_code == 0
    changed = CliRunner().invoke(app, [*arguments, "--seed", "1"])
    assert changed.exit_code == 1
    assert "was started with seed 0, which is now 1" in changed.output


def test_classes_that_the_model_does_not_have_are_refused(data: Path, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "other", seed=0, class_names=("x", "y", "w"))
    done = CliRunner().invoke(
        app, ["evaluate", "nll", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--num", "2"]
    )
    assert done.exit_code == 1
    assert "it does not have: z" in done.output


def test_a_folder_in_use_or_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with (
        evaluation_folder(folder, {"seed": 0}),
        pytest.raises(FolderInUse, match="in use"),
        evaluation_folder(folder, {"seed": 0}),
    ):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(EvaluationError, match="something else"), evaluation_folder(tmp_path / "mine", {}):
        pass


def test_images_that_are_not_square_keep_their_shape(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "wide", image_size=(8, 16))
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 16, 1), dtype=np.uint8)
    classes = np.array(tiny_config().class_names)
    np.savez(tmp_path / "wide.npz", images=images, labels=np.arange(10) % len(classes), classes=classes)
    arguments = ["evaluate", "nll", str(model), "--data", str(tmp_path / "wide.npz"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--steps", "2", "--num", "2"])
    assert done.exit_code == 0, done.output
