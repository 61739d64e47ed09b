"""The gradient noise scale: of a quadratic whose noise is known, and of a tiny network by objective and sampler."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cli.main import app
from tests.networks import RANDOM_MODEL_STEPS, write_random_model
from tests.unit.trainer.evaluation.test_nll import opened
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.folder import EvaluationStopped
from trainer.evaluation.gradient_noise import Case, GradientNoise, NoiseOptions, TrainedObjective, usual_cases
from trainer.noise_scale import noise_scale, squared_norms

DEVIATIONS = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
DISTANCE = torch.tensor([0.5, -1.0, 0.25, 0.0], dtype=torch.float64)
TRACE, SQUARED = float((DEVIATIONS**2).sum()), float((DISTANCE**2).sum())


def quadratic_norms(seed: int, batches: int, small: int, big: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return norms for the loss |theta - x|^2 / 2, whose gradient theta - x has mean DISTANCE and known variances."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def losses() -> Iterator[Tensor]:
        for _ in range(big // small):
            x = DEVIATIONS * torch.randn(small, 4, generator=generator, dtype=torch.float64) - DISTANCE
            yield ((theta - x) ** 2).sum(dim=1).mean() / 2

    return np.array([squared_norms([theta], losses()) for _ in range(batches)])


def test_the_noise_of_a_quadratic_is_found_within_its_errors() -> None:
    found = noise_scale(quadratic_norms(0, batches=200, small=4, big=64), 4, 64)
    for estimate, truth in zip(found, (TRACE / SQUARED, TRACE, SQUARED), strict=True):
        assert abs(estimate.value - truth) < 4 * estimate.std_error
        assert estimate.std_error < 0.1 * truth


def test_standard_errors_are_the_spread_of_repeated_measurements() -> None:
    found = [noise_scale(quadratic_norms(seed, batches=12, small=2, big=32), 2, 32) for seed in range(60)]
    for name in ("trace", "gradient_squared"):
        values = [getattr(one, name) for one in found]
        spread = np.std([value.value for value in values], ddof=1)
        assert np.mean([value.std_error for value in values]) == pytest.approx(spread, rel=0.35)
        assert np.mean([value.value for value in values]) == pytest.approx(
            TRACE if name == "trace" else SQUARED, rel=0.1
        )


def test_a_gradient_lost_in_the_noise_has_no_finite_scale() -> None:
    found = noise_scale(np.array([[1.0, 0.2], [1.0, 0.1]]), 1, 4)
    assert found.gradient_squared.value < 0
    assert found.noise_scale.value == math.inf


def test_batch_sizes_must_differ() -> None:
    with pytest.raises(ValueError, match="must be smaller than"):
        noise_scale(np.ones((2, 2)), 4, 4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "train.npz"
    images = rng.integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=rng.integers(0, 3, 12), classes=np.array(["x", "y", "z"]))
    return path


def test_importance_sampling_reduces_the_noise_of_the_bound(data: Path, tmp_path: Path) -> None:
    subject, dataset = opened(data, write_random_model(tmp_path / "a", seed=0))
    noise = GradientNoise(subject, dataset, NoiseOptions(small=4, big=16, batches=12, history=4))
    uniform = noise.measure(Case("vlb", "uniform"), None, tmp_path / "uniform")
    sampler = noise.importance(tmp_path / "history")
    assert sampler.warmed_up
    importance = noise.measure(Case("vlb", "loss_second_moment"), sampler, tmp_path / "importance")

    assert importance.trace.value < 0.2 * uniform.trace.value  # the decoder's term is 1000 times larger than most
    assert importance.gradient_squared.value > 5 * importance.gradient_squared.std_error


def test_an_interrupted_measurement_continues_with_equal_numbers(data: Path, tmp_path: Path) -> None:
    subject, dataset = opened(data, write_random_model(tmp_path / "a", seed=0))
    noise = GradientNoise(subject, dataset, NoiseOptions(small=2, big=4, batches=4))
    case = Case("hybrid", "uniform")
    whole = noise.measure(case, None, tmp_path / "whole")
    calls = iter(range(100))
    with pytest.raises(EvaluationStopped):
        noise.measure(case, None, tmp_path / "parts", stop=lambda: next(calls) == 2)
    counted: list[int] = []
    assert noise.measure(case, None, tmp_path / "parts", counted.append) == whole
    assert (counted[0], sum(counted)) == (8, 16)


def test_the_command_compares_objectives(data: Path, tmp_path: Path) -> None:
    model, out = write_random_model(tmp_path / "a", seed=0), tmp_path / "out"
    arguments = ["evaluate", "noise-scale", str(model), "--data", str(data), "--out", str(out)]
    arguments += ["--small", "2", "--big", "8", "--batches", "2", "--history", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    content = json.loads((out / "results.json").read_text())
    assert [(case["loss"], case["timestep_sampler"]) for case in content["cases"]] == [
        ("hybrid", "uniform"),
        ("vlb", "uniform"),
        ("vlb", "loss_second_moment"),
    ]
    assert all(case["trace"]["value"] > 0 for case in content["cases"])
    assert "tr(Sigma)" in done.output
    assert (out / "history.f32").stat().st_size == 4 * RANDOM_MODEL_STEPS

    wrong = CliRunner().invoke(app, [*arguments, "--case", "vlb:stratified"])
    assert wrong.exit_code == 1
    assert "a case is LOSS:SAMPLER" in wrong.output


@pytest.mark.parametrize(
    ("recorded", "first", "settings"),
    [
        ({}, "hybrid", {}),
        ({"loss": "vlb"}, "vlb", {}),
        ({"loss": "hybrid", "rescale_vlb": False}, "hybrid", {"rescale_vlb": False}),
        ({"loss": "hybrid", "min_snr_gamma": 0.1}, "hybrid", {"min_snr_gamma": 0.1}),
    ],
)
def test_the_objective_that_trained_the_model_is_measured(
    data: Path, tmp_path: Path, recorded: dict[str, object], first: str, settings: dict[str, object]
) -> None:
    provenance = {"train_config": recorded} if recorded else {}
    subject, dataset = opened(data, write_random_model(tmp_path / "a", seed=0, provenance=provenance))
    assert [str(case) for case in usual_cases(subject)] == [
        f"{first}:uniform", "vlb:uniform", "vlb:loss_second_moment"
    ]  # fmt: skip
    assert TrainedObjective.of(subject.config).settings == settings
    options = NoiseOptions(small=2, big=4, batches=2)
    imported, _ = opened(data, write_random_model(tmp_path / "b", seed=0))
    case = Case("hybrid", "uniform")
    found, usual = (
        GradientNoise(one, dataset, options).measure(case, None, tmp_path / name)
        for name, one in (("found", subject), ("usual", imported))
    )
    assert (found == usual) == (not settings)


def test_an_objective_of_another_version_is_refused(data: Path, tmp_path: Path) -> None:
    provenance = {"train_config": {"loss": "newer"}}
    subject, _ = opened(data, write_random_model(tmp_path / "a", seed=0, provenance=provenance))
    with pytest.raises(EvaluationError, match=r"cannot measure the objective that the model was trained with.*loss"):
        usual_cases(subject)
