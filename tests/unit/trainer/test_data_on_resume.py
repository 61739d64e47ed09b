"""What a resumed run notices of its data, and which data options it may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.trainer.test_hugging_face_data import damaged_png, pairs, png, whole_png
from tests.unit.trainer.test_trainer import weights
from tests.unit.trainer.test_unreadable_images import damage, folder
from trainer.config import TrainConfig
from trainer.data import DataError, Uint8Array, checking, open_dataset
from trainer.errors import TrainError
from trainer.loop import resolve, train
from trainer.run_folder import checkpoints


def config(**fields: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {
                "image_size": 8,
                "image_channels": 1,
                "model_channels": 32,
                "channel_mult": [1],
                "attention_resolutions": [],
            },
            "total_images": 4,
            "batch_size": 4,
            "preview_per_class": 0,
            **fields,
        }
    )


def run(tmp_path: Path, config: TrainConfig, name: str = "run", **options: Any) -> None:
    dataset = open_dataset(tmp_path / "data", 8, 1, config.data)
    train(resolve(config, dataset), dataset, tmp_path / name, **options)


@pytest.fixture
def picture(tmp_path: Path) -> Uint8Array:
    pixels: Uint8Array = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    (tmp_path / "data" / "a").mkdir(parents=True)
    for number in range(4):
        Image.fromarray(pixels + number).save(tmp_path / "data" / "a" / f"{number}.bmp")
    return pixels


def test_a_mended_image_of_equal_size_is_noticed(tmp_path: Path, picture: Uint8Array) -> None:
    run(tmp_path, config())
    Image.fromarray(255 - picture).save(tmp_path / "data" / "a" / "2.bmp")
    with pytest.raises(TrainError, match=r"other data: content_sha256 was .*add --accept-changed-data"):
        run(tmp_path, config(total_images=8), resume=True)
    run(tmp_path, config(total_images=8), resume=True, accept_changed_data=True)


@pytest.mark.usefixtures("picture")
def test_only_options_without_effect_on_the_images_may_change(tmp_path: Path) -> None:
    run(tmp_path, config())
    run(tmp_path, config(total_images=8, data={"workers": 1}), resume=True)
    for change in ({"random_crop": True}, {"value_range": [0, 1]}):
        with pytest.raises(TrainError, match=f"started with other values: data.{next(iter(change))} was"):
            run(tmp_path, config(total_images=12, data={"workers": 1, **change}), resume=True)


def test_a_run_that_meets_an_unreadable_image_continues_with_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of the images stays: the resumed run equals one that skipped from its start."""
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    damage(folder(tmp_path) / "b" / "6.png")  # in the second batch
    start = config(batch_size=2, total_images=16, precision="float32")
    with pytest.raises(TrainError, match=r"6\.png: .*; or set data\.unreadable=skip") as caught:
        run(tmp_path, start)
    assert caught.value.resume_with == ("data.unreadable=skip",)
    assert 0 < int(checkpoints(tmp_path / "run")[-1].name) < 8
    capsys.readouterr()
    skipping = start.with_overrides({"data.unreadable": "skip"})
    run(tmp_path, skipping, resume=True)
    error = capsys.readouterr().err
    assert "; changed: data.unreadable fail -> skip" in error
    assert "6.png: " in error
    assert ".png takes its place" in error
    resumed = weights(checkpoints(tmp_path / "run")[-1])
    run(tmp_path, skipping, name="whole")
    whole = weights(checkpoints(tmp_path / "whole")[-1])
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_pairs_of_a_saved_data_set_are_offered_skip_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    images, conds = [png(10), png(20), whole_png(), png(40)], [png(1), png(2), damaged_png(tmp_path), png(4)]
    dataset = pairs(tmp_path / "data", images, conds, "fail")
    network = {**config().model.model_dump(), "cond_channels": 1}
    start = config(model=network, data={"image_column": "image", "cond_column": "edges"})
    with pytest.raises(DataError, match=r"row 2.*; or set data\.unreadable=skip"):
        train(resolve(start, dataset), dataset, tmp_path / "run")
