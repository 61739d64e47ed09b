"""A diverged run returns to its newest checkpoint, skips the images since, and goes on with half the learning rate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from formats.checkpoint_config import read_config
from tests.unit.trainer.test_resume import write_npz
from tests.unit.trainer.test_trainer import tiny, train, weights
from trainer import loop
from trainer.config import TrainConfig
from trainer.errors import TrainError
from trainer.optimisation import learning_rate
from trainer.run_folder import LOG_FILE, checkpoint_folder, checkpoints

BAD = range(16, 20)
"""Positions whose learning rate makes the network diverge; there is a checkpoint right before them."""
CONFIG = tiny(
    checkpoint_every_images=8, keep_checkpoints=9, max_rollbacks=2, ema_sigma_rels=(0.1,), preview_per_class=0
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "toy.npz")


@pytest.fixture
def _bad_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(config: TrainConfig, images_seen: int) -> float:
        return 1e7 if images_seen in BAD else learning_rate(config, images_seen)

    monkeypatch.setattr(loop, "learning_rate", rate)


def rates(run: Path) -> dict[int, float]:
    """Return the learning rate of each log line."""
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    return {line["images"]: line["lr"] for line in lines}


@pytest.mark.usefixtures("_bad_batch")
def test_a_rolled_back_run_skips_the_bad_images_and_halves_the_rate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = train(CONFIG, data, run)
    assert "Rolled back to the weights after 16 images" in " ".join(capsys.readouterr().err.split())
    before, after = (weights(checkpoint_folder(run, images)) for images in (16, 24))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    learned = rates(run)
    learned.pop(24, None)  # the line is written if only the loss shows the divergence
    assert learned == {8: 1e-3, 16: 1e-3, 32: 5e-4, 40: 5e-4}
    (rollback,) = read_config(model).provenance["rollbacks"]
    assert (rollback["images_seen"], rollback["to"]) == (24, 16)
    assert "gradient" in rollback["problem"] or "mse" in rollback["problem"]
    assert not all(torch.equal(tensor, after[name]) for name, tensor in weights(checkpoints(run)[-1]).items())


@pytest.mark.usefixtures("_bad_batch")
def test_a_rolled_back_run_resumes_bit_for_bit(data: Path, tmp_path: Path) -> None:
    train(CONFIG, data, tmp_path / "whole")
    whole = checkpoints(tmp_path / "whole")[-1]
    for last in (16, 24, 32):  # the checkpoint before the divergence, the one of the rollback, and a later one
        killed = tmp_path / f"killed after {last}"
        shutil.copytree(tmp_path / "whole", killed)
        for folder in checkpoints(killed):
            if int(folder.name) > last:
                shutil.rmtree(folder)
        train(CONFIG, data, killed, resume=True)
        resumed = checkpoints(killed)[-1]
        found = weights(resumed)
        for name, tensor in weights(whole).items():
            assert torch.equal(found[name], tensor), (last, name)
        assert rates(killed) == rates(tmp_path / "whole")
        assert read_config(resumed).provenance["rollbacks"] == read_config(whole).provenance["rollbacks"]


@pytest.mark.usefixtures("_bad_batch")
def test_a_run_may_roll_back_at_its_very_end(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = train(CONFIG.replace(total_images=20), data, run)
    assert read_config(model).provenance["images_seen"] == 20
    assert all(tensor.isfinite().all() for tensor in weights(checkpoints(run)[-1]).values())
    assert [int(folder.name) for folder in checkpoints(run)] == [8, 16, 20]


def test_a_run_rolls_back_at_most_so_many_times(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(CONFIG.replace(total_images=8), data, run)
    with pytest.raises(TrainError, match=r"diverged after 32 images, after 2 rollbacks: .*Continue from the") as caught:
        train(CONFIG.replace(lr=1e7), data, run, resume=True)
    assert caught.value.resume_with == ["lr=0.0001", "grad_clip=1"]
    assert len(read_config(checkpoints(run)[-1]).provenance["rollbacks"]) == 2
    train(CONFIG.replace(lr=1e-4, grad_clip=1.0), data, run, resume=True)
    assert rates(run)[40] == pytest.approx(0.25e-4)


def test_a_run_without_a_checkpoint_cannot_roll_back(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="There is no checkpoint yet"):
        train(CONFIG.replace(lr=1e7), data, tmp_path / "run")


@pytest.mark.usefixtures("_bad_batch")
def test_validations_of_abandoned_weights_are_forgotten(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(CONFIG.replace(validation_share=0.1, validation_every_images=4), data, run)
    images = [json.loads(line)["images"] for line in (run / "validation.jsonl").read_text().splitlines()]
    assert images == [4, 8, 12, 16, 24, 28, 32, 36, 40]
