"""Every objective trains in the same loop, and becomes a checkpoint that others read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import CheckpointConfig, ClassifierConfig, DiffusionConfig
from diffusion.unet import UNet
from formats.checkpoint import build_network, load_classifier, read_weights
from formats.checkpoint_config import read_config
from formats.classifier_folder import misfit
from tests.unit.trainer.test_resume import train, write_npz
from tests.unit.trainer.test_trainer import tiny, weights
from trainer.config import TrainConfig
from trainer.run_folder import LOG_FILE, checkpoints


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "toy.npz")


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_every_objective_variance_and_prediction_trains(
    npz: Path, tmp_path: Path, loss: str, variance: str, prediction: str
) -> None:
    learned = variance.startswith("learned")
    if (loss == "hybrid" and not learned) or (loss == "simple" and learned):
        with pytest.raises(ValueError, match="loss"):
            tiny(loss=loss, diffusion={"variance": variance})
        return
    diffusion = {"num_timesteps": 30, "variance": variance, "prediction": prediction, "noise_schedule": "linear"}
    config = tiny(total_images=8, log_every_batches=1, loss=loss, diffusion=diffusion, preview_per_class=0)
    train(config, npz, tmp_path / "run")
    lines = log(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in lines)
    terms = {"loss", "mse", "vb_bpd"} if learned or loss == "vlb" else {"loss", "mse"}
    assert {name.partition("_q")[0] for line in lines for name in line if "_q" in name} == terms
    if loss == "vlb":
        assert lines[0]["loss"] == pytest.approx(30 * lines[0]["vb_bpd"], rel=1e-3)


def test_importance_sampling_resumes_with_its_history(npz: Path, tmp_path: Path) -> None:
    config = tiny(loss="vlb", diffusion={"num_timesteps": 2}, preview_per_class=0, total_images=60)
    train(config, npz, tmp_path / "whole")
    train(config.replace(total_images=40), npz, tmp_path / "halves")
    train(config, npz, tmp_path / "halves", resume=True)
    whole, halves = (weights(checkpoints(tmp_path / name)[-1]) for name in ("whole", "halves"))
    assert whole["timestep_sampler.counts"].tolist() == [10, 10]
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


def test_an_upsampler_is_trained_on_its_own_images(npz: Path, tmp_path: Path) -> None:
    model = tiny().model.replace(low_res_size=4)
    folder = train(tiny(total_images=8, model=model.model_dump()), npz, tmp_path / "run")
    config = read_config(folder)
    assert isinstance(config, CheckpointConfig)
    assert config.model.low_res_size == 4
    network = build_network(config)
    assert isinstance(network, UNet)
    network.load_state_dict(read_weights(folder))
    output = network(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 3]), torch.zeros(2, 1, 8, 8))
    assert output.shape == (2, 2, 8, 8)


def classifier_config(**changes: object) -> TrainConfig:
    model = ClassifierConfig(
        image_size=8, image_channels=1, model_channels=32, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_heads=1, num_classes=2, pool="adaptive",
    )  # fmt: skip
    return TrainConfig(
        model=model, diffusion=DiffusionConfig(num_timesteps=100, rescale_timesteps=True), loss="cross_entropy",
        total_images=64, batch_size=16, lr=3e-3, precision="float32", log_every_batches=1, checkpoint_every_images=64,
        ema_decay=0.5,
    ).replace(**changes)  # fmt: skip


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Images that are bright on the left or on the right."""
    path = tmp_path / "halves.npz"
    images = np.zeros((32, 8, 8, 1), np.uint8)
    images[:16, :, :4] = 255
    images[16:, :, 4:] = 255
    np.savez(path, images=images, labels=np.arange(32) // 16, classes=np.array(["left", "right"]))
    return path


def test_a_classifier_learns_and_guides(halves: Path, tmp_path: Path) -> None:
    folder = train(classifier_config(total_images=640), halves, tmp_path / "run")
    first, *_, last = log(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-3)  # the head begins at zero
    assert last["acc@1_q0"] == 1.0
    assert np.mean([line["loss"] for line in log(tmp_path / "run")[-8:]]) < 0.65
    assert last["acc@5"] == 1.0
    config, _ = load_classifier(folder)
    assert config.class_names == ("left", "right")
    unet = tiny().model.replace(num_classes=2)
    model = CheckpointConfig(model=unet, diffusion=DiffusionConfig(rescale_timesteps=True))
    assert misfit(model, config) is None


def test_a_classifier_resumes_bit_for_bit(halves: Path, tmp_path: Path) -> None:
    train(classifier_config(), halves, tmp_path / "whole")
    train(classifier_config(total_images=32), halves, tmp_path / "parts")
    train(classifier_config(), halves, tmp_path / "parts", resume=True)
    whole, parts = (weights(checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_a_classifier_is_written_from_another_average(halves: Path, tmp_path: Path) -> None:
    train(classifier_config(ema_decay=(0.5, 0.9)), halves, tmp_path / "run")
    arguments = ["ema", str(tmp_path / "run"), str(tmp_path / "out"), "--decay", "0.9"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert load_classifier(tmp_path / "out")[0].provenance["ema"] == {"decay": 0.9}


def test_the_loss_and_the_network_must_fit() -> None:
    with pytest.raises(ValueError, match="'cross_entropy' is the only one of a classifier"):
        classifier_config(loss="hybrid")
    with pytest.raises(ValueError, match="'cross_entropy' is the only one of a classifier"):
        tiny(loss="cross_entropy")
    with pytest.raises(ValueError, match="class_conditional must be true for a classifier"):
        classifier_config(class_conditional=False)
