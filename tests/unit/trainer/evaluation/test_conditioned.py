"""Evaluations of models that take conditioning images: they get those of the data, read as in training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from cli.main import app
from diffusion.conditioning import enlarged
from diffusion.losses import LossTables, predict_x0, q_sample, training_losses, vb_term_bpd
from diffusion.noise import STREAM_EVALUATION, normal
from diffusion.respacing import Process, respace
from diffusion.update import split_output
from formats.ensemble import write_ensemble
from tests.networks import write_random_model
from trainer.data import DataError, Dataset, network_input, open_dataset
from trainer.evaluation.gradient_noise import Case, GradientNoise, NoiseOptions
from trainer.evaluation.inputs import RealInputs
from trainer.evaluation.nll import NllOptions, chosen_images, evaluate_nll
from trainer.evaluation.reading import open_inputs
from trainer.evaluation.subject import Subject, load_subject
from trainer.timestep_sampler import UniformSampler

IMAGES = 6
CPU = torch.device("cpu")
TRAINED = {"train_config": {"data": {"cond_range": [0, 1000]}}}
"""The part of a run's provenance that says how its data were read."""
MAPS: dict[str, Any] = {"model": {"cond_channels": 2}, "cond_range": (0, 1000), "provenance": TRAINED}
UPSAMPLER: dict[str, Any] = {"model": {"low_res_size": 2}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "test.npz"
    images = rng.integers(0, 256, (IMAGES, 4, 4, 1), dtype=np.uint8)
    cond = rng.uniform(0, 1000, (IMAGES, 4, 4, 2)).astype(np.float32)
    np.savez(path, images=images, labels=np.arange(IMAGES) % 3, classes=np.array(["z", "y", "x"]), cond=cond)
    return path


def inputs_by_hand(data: Path, index: int, fields: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return x0, y and cond of an image of the file."""
    with np.load(data) as arrays:
        x0 = torch.from_numpy(network_input(arrays["images"][[index]]))
        cond = torch.from_numpy(arrays["cond"][[index]]).permute(0, 3, 1, 2) / 500 - 1
        y = torch.from_numpy(arrays["labels"][[index]])
    return x0, y, cond if fields is MAPS else enlarged(F.avg_pool2d(x0, 2), 4, 4)


def noise_by_hand(index: int, t: int) -> Tensor:
    key = [torch.tensor([value]) for value in (0, index, t)]
    return normal(key[0], key[1], key[2], STREAM_EVALUATION, (1, 4, 4))


def opened(data: Path, model: Path) -> tuple[Subject, Dataset]:
    subject = load_subject(model, CPU)
    return subject, open_inputs(data, [subject.config], labelled=True)[0]


def term_by_hand(
    subject: Subject, process: Process, s: int, noise: Tensor, x0: Tensor, y: Tensor, cond: Tensor
) -> Tensor:
    diffusion, tables, at = subject.config.diffusion, LossTables.from_process(process), torch.tensor([s])
    x_t = q_sample(tables, x0, at, noise)
    (network,) = subject.networks
    output = network(x_t, torch.from_numpy(process.t_model)[at], y, cond=cond)
    prediction, var_values = split_output(output, 1)
    pred_x0 = predict_x0(tables, diffusion, prediction, x_t, at, clip=True)
    return vb_term_bpd(tables, diffusion, pred_x0, var_values, x0, x_t, at)


@pytest.mark.parametrize("fields", [MAPS, UPSAMPLER])
def test_bits_per_dim_of_a_conditioned_model_are_those_computed_by_hand(
    data: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    subject, dataset = opened(data, write_random_model(tmp_path / "a", seed=0, **fields))
    options = NllOptions(respacing="7", images=IMAGES, batch_size=5)
    found = evaluate_nll(subject, dataset, options, tmp_path / "terms")
    process = respace(subject.config.diffusion, "7")
    for row, index in enumerate(chosen_images(dataset, options).tolist()):
        for s, t in enumerate(process.timestep_map.tolist()):
            inputs = inputs_by_hand(data, index, fields)
            with torch.no_grad():
                expected = term_by_hand(subject, process, s, noise_by_hand(index, t), *inputs)
            np.testing.assert_allclose(found.vb_bpd[row, s], expected.item(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fields", [MAPS, UPSAMPLER])
def test_the_noise_scale_of_a_conditioned_model_is_that_of_gradients_computed_by_hand(
    data: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    subject, dataset = opened(data, write_random_model(tmp_path / "a", seed=0, **fields))
    options = NoiseOptions(small=1, big=2, batches=2)
    found = GradientNoise(subject, dataset, options).measure(Case("hybrid", "uniform"), None, tmp_path / "norms")

    diffusion = subject.config.diffusion
    process, (network,) = respace(diffusion), subject.networks
    tables, t_model = LossTables.from_process(process), torch.from_numpy(process.t_model)
    small, big = [], []
    for number in range(options.batches):
        rng = np.random.default_rng((0, 3, number))
        images = rng.integers(IMAGES, size=2)
        t, _ = UniformSampler(process.num_steps).sample(rng, 2)
        gradients = []
        for k, index in enumerate(images.tolist()):
            x0, y, cond = inputs_by_hand(data, index, fields)
            noise, at = noise_by_hand(number * 2 + k, 0), torch.tensor([t[k]])
            x_t = q_sample(tables, x0, at, noise)
            output = network(x_t, t_model[at], y, cond=cond)
            loss = training_losses(
                tables, diffusion, output, x0, x_t, noise, at, loss="hybrid", rescale=True
            ).loss.mean()
            parts = torch.autograd.grad(loss, list(network.parameters()))
            gradients.append(torch.cat([part.flatten().double() for part in parts]))
        small.append(np.mean([float(gradient.square().sum()) for gradient in gradients]))
        big.append(float(((gradients[0] + gradients[1]) / 2).square().sum()))
    trace = (np.mean(small) - np.mean(big)) / (1 - 1 / 2)
    assert found.trace.value == pytest.approx(trace, rel=1e-4)
    assert found.gradient_squared.value == pytest.approx(2 * np.mean(big) - np.mean(small), rel=1e-3, abs=1e-4 * trace)


def evaluate(command: str, models: list[Path], data: Path, out: Path, *options: str | Path) -> tuple[int, str]:
    arguments = ["evaluate", command, *map(str, models), "--data", str(data), "--out", str(out), *map(str, options)]
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, " ".join(done.output.split())


def test_the_commands_take_pairs_and_compare_them_with_models_without_conditions(data: Path, tmp_path: Path) -> None:
    plain = write_random_model(tmp_path / "plain", seed=1)
    maps, upsampler = (
        write_random_model(tmp_path / name, seed=1, **fields) for name, fields in (("maps", MAPS), ("up", UPSAMPLER))
    )
    code, output = evaluate("nll", [plain, maps, upsampler], data, tmp_path / "nll", "--steps", "4", "--num", "3")
    assert code == 0, output
    assert "conditioning images: 6 images 4x4; float32 values in" in output
    content = json.loads((tmp_path / "nll" / "results.json").read_text())
    assert content["data"]["cond_images"] == IMAGES
    assert content["reading"]["cond_range"] == [0, 1000]
    alone, _ = evaluate("nll", [plain], data, tmp_path / "alone", "--steps", "4", "--num", "3")
    assert alone == 0
    without = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert content["models"][0]["total_bpd"] == without["models"][0]["total_bpd"]

    with np.load(data) as arrays:
        np.save(tmp_path / "conds.npy", arrays["cond"] / 2)
    conds: dict[str, list[str | Path]] = {"noise": [], "other": ["--cond", tmp_path / "conds.npy"]}
    for name, cond in conds.items():
        options: list[str | Path] = ["--small", "2", "--big", "4", "--batches", "2", "--case", "simple:uniform", *cond]
        code, output = evaluate("noise-scale", [maps], data, tmp_path / name, *options)
        assert code == 0, output
    found = [json.loads((tmp_path / name / "results.json").read_text())["cases"] for name in ("noise", "other")]
    assert found[0][0]["trace"]["value"] != found[1][0]["trace"]["value"]


def test_an_ensemble_of_conditioned_models_is_evaluated(data: Path, tmp_path: Path) -> None:
    first, second = (write_random_model(tmp_path / str(seed), seed=seed, **MAPS) for seed in (0, 1))
    both = write_ensemble(tmp_path / "both", [(0, 10, first), (10, 0, second)]).folder
    code, output = evaluate("nll", [both, first], data, tmp_path / "nll", "--steps", "4", "--num", "2")
    assert code == 0, output
    one, other = json.loads((tmp_path / "nll" / "results.json").read_text())["models"]
    same = [t < 10 for t in one["timesteps"]]
    assert [
        a == pytest.approx(b, rel=1e-3, abs=1e-5)
        for a, b in zip(one["vb_bpd"]["mean"], other["vb_bpd"]["mean"], strict=True)
    ] == same


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    with np.load(data) as arrays:
        content = dict(arrays)
    np.savez(tmp_path / "alone.npz", **{name: array for name, array in content.items() if name != "cond"})
    np.savez(tmp_path / "values.npz", **{**content, "images": content["images"] / 255})
    maps, plain, upsampler = (
        write_random_model(tmp_path / name, seed=0, **fields)
        for name, fields in (("maps", MAPS), ("plain", {}), ("up", UPSAMPLER))
    )
    three = write_random_model(tmp_path / "three", seed=0, model={"cond_channels": 3})
    metres = write_random_model(
        tmp_path / "metres", seed=0, model={"cond_channels": 2}, cond_range=(0, 9),
        provenance={"train_config": {"data": {"cond_range": [0, 9]}}},
    )  # fmt: skip
    floats = write_random_model(
        tmp_path / "floats", seed=0, value_range=(0, 1), provenance={"train_config": {"data": {"value_range": [0, 1]}}}
    )
    other = write_random_model(tmp_path / "other", seed=0, class_names=("x", "y", "w"))
    cases: list[tuple[str, list[Path], Path, list[str | Path], str]] = [
        ("nll", [maps], tmp_path / "alone.npz", [], "must contain the arrays 'cond'"),
        ("noise-scale", [maps], tmp_path / "alone.npz", [], "must contain the arrays 'cond'"),
        ("nll", [three], data, [], "the array 'cond' has 2 channels, model.cond_channels is 3"),
        ("nll", [plain], data, ["--cond", data], "--cond must be absent, because model.cond_channels is 0"),
        ("noise-scale", [upsampler], data, ["--cond", data], "an upsampler's are made from the images"),
        ("nll", [plain, maps, three], data, [], "models must have equal model.cond_channels, .*: 2 and 3"),
        ("nll", [maps, metres], data, [], "models must have equal cond_range"),
        ("nll", [floats], tmp_path / "values.npz", [], "images of 8 bits are needed; the data set has float32"),
        ("nll", [plain, other], data, [], "classes of the data must be classes of other; it does not have: z"),
    ]
    for command, models, path, options, message in cases:
        code, output = evaluate(command, models, path, tmp_path / "out", *options)
        assert code == 1, output
        assert re.search(message, output), output
        assert not (tmp_path / "out").exists()


def test_data_without_conditioning_images_are_refused(data: Path, tmp_path: Path) -> None:
    subject = load_subject(write_random_model(tmp_path / "maps", seed=0, **MAPS), CPU)
    with pytest.raises(DataError, match=r"model\.cond_channels of maps is 2, and these data are images without"):
        RealInputs(subject, open_dataset(data, 4, 1))
