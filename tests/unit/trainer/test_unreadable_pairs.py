"""Pairs of files of which one image is unreadable: left out, or replaced, as pairs; the same ones on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.trainer.test_trainer import tiny, weights
from tests.unit.trainer.test_unreadable_images import damage
from trainer import loop
from trainer.batches import read_pairs
from trainer.data import DataConfig, DataError, Dataset, checking, open_dataset
from trainer.data.image_file import Header, Mode, inspect
from trainer.loop import resolve
from trainer.run_folder import checkpoints

COUNT = 8


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Write pairs of two classes: image k has the grey level 10 k, its condition 10 k + 5."""
    for side, shift in (("images", 0), ("conds", 5)):
        for number in range(COUNT):
            path = tmp_path / side / "ab"[number // 4] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (64, 64), 10 * number + shift).save(path)
    return tmp_path


def opened(folders: Path, unreadable: str = "skip", **options: Any) -> Dataset:
    config = DataConfig.model_validate({"unreadable": unreadable})
    return open_dataset(
        folders / "images", 8, 1, config, cond_channels=1, cond=folders / "conds", cache=folders / "cache", **options
    )


def levels(data: Dataset, indices: list[int]) -> tuple[list[int], list[int]]:
    """Return the grey levels of images and of their conditions, after checking that each is read alike by itself."""
    assert data.conditions is not None
    images, conds = data.conditions.pairs(np.array(indices))
    np.testing.assert_array_equal(images, data.images(np.array(indices)))
    np.testing.assert_array_equal(conds, data.conditions.images(np.array(indices)))
    return images[:, 0, 0, 0].tolist(), conds[:, 0, 0, 0].tolist()


def test_pairs_found_before_the_first_step_are_left_out_both_named_and_counted(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folders / "images" / "a" / "1.png")
    (folders / "conds" / "b" / "6.png").write_bytes(b"junk")
    (folders / "conds" / "a" / "1.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"images.a.1\.png: .* leave out such files with --set data.unreadable=skip"):
        opened(folders, "fail")
    data = opened(folders)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = [0, 20, 30, 40, 50, 70]
    assert levels(data, list(range(6))) == (expected, [level + 5 for level in expected])
    first, second = data.summary.splitlines()
    assert first.endswith("; skipped: 1 unreadable, 1 with an unreadable conditioning image")
    assert "data: 6 images 64x64; 2 classes: a (3), b (3); " in first
    assert second.endswith("; skipped: 2 unreadable")
    error = capsys.readouterr().err
    assert "warning: 2 of 8 pairs are skipped, because one of their images cannot be read:" in error
    for text in (
        f"{folders / 'images' / 'a' / '1.png'}: ",
        f"its conditioning image: {folders / 'conds' / 'a' / '1.png'}: ",
        f"{folders / 'conds' / 'b' / '6.png'}: it is damaged",
        f"(the conditioning image of {folders / 'images' / 'b' / '6.png'})",
    ):
        assert text in error
    for side in ("images", "conds"):
        (folders / side / "a" / "1.png").unlink()
        (folders / side / "b" / "6.png").unlink()
    assert opened(folders).description == data.description


def test_an_unreadable_image_leaves_its_readable_condition_out(folders: Path) -> None:
    (folders / "images" / "b" / "5.png").write_bytes(b"junk")
    first, second = opened(folders).summary.splitlines()
    assert first.endswith("skipped: 1 unreadable")
    assert second.endswith("skipped: 1 with an unreadable image")


def test_without_a_readable_pair_there_is_nothing_to_skip(folders: Path) -> None:
    for number in range(COUNT):
        side = ("images", "conds")[number % 2]
        (folders / side / "ab"[number // 4] / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="8 of 8 pairs cannot be read; repair or remove them:"):
        opened(folders)


def test_pairs_found_later_are_replaced_as_pairs_of_their_class(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folders / "conds" / "a" / "2.png")
    damage(folders / "images" / "a" / "3.png")
    damage(folders / "images" / "b" / "7.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data = opened(folders)
    assert len(data.labels) == COUNT
    capsys.readouterr()
    assert levels(data, [1, 2, 3, 7, 7]) == ([10, 0, 0, 40, 40], [15, 5, 5, 45, 45])
    error = capsys.readouterr().err
    assert error.count("warning: ") == 3  # each is reported once
    assert "the pair of image a/2.png and conditioning image a/2.png is replaced by that of image a/0.png" in error
    assert "unreadable pairs found so far: 3" in error
    assert levels(opened(folders), [3, 2]) == ([0, 0], [5, 5])  # in any order, of any batch
    x0, cond = read_pairs(data, np.array([2, 4]))
    assert cond is not None
    torch.testing.assert_close(cond - x0, torch.full_like(x0, 5 / 127.5))


def test_a_pair_is_replaced_by_one_of_its_own_part(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(folders / "conds" / "a" / "2.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data = opened(folders)
    assert levels(data, [2]) == ([30], [35])
    assert levels(data.part(np.array([1, 2, 5])), [0, 1, 2]) == ([10, 10, 50], [15, 15, 55])
    assert levels(data.part(np.array([6, 2, 0, 3])).part(np.array([1, 2])), [0]) == ([0], [5])
    with pytest.raises(DataError, match="no pair of its class can be read"):
        levels(data.part(np.array([2, 4])), [0])


def test_a_class_without_a_readable_pair_ends_the_run(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4, 8):
        damage(folders / ("images", "conds")[number % 2] / "b" / f"{number}.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    with pytest.raises(DataError, match=r"7\.png: .*; no pair of its class can be read"):
        levels(opened(folders), [7])


def test_a_pair_that_is_readable_again_does_not_replace_its_own_replacement(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders / "images" / "a" / "0.png"
    whole = path.read_bytes()
    damage(path)
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data = opened(folders)
    assert levels(data, [0]) == ([10], [15])
    path.write_bytes(whole)  # as after an error of a network drive
    for number in (1, 2, 3):
        damage(folders / "images" / "a" / f"{number}.png")
    with pytest.raises(DataError, match="no pair of its class can be read"):
        levels(data, [0])


def test_the_index_sees_the_same_pairs(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "INDEXED_FILES", 1)
    (folders / "images" / "a" / "1.png").write_bytes(b"junk")
    damage(folders / "conds" / "b" / "6.png")
    first = opened(folders)
    read: list[Path] = []

    def inspected(path: Path, mode: Mode, options: DataConfig) -> Header:
        read.append(path)
        return inspect(path, mode, options)

    monkeypatch.setattr(checking, "inspect", inspected)
    again = opened(folders)
    assert [path.name for path in read] == ["1.png"]  # what is known of the others is in the index
    assert again.description == first.description
    assert again.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "index of the files: " in again.summary


def test_a_resumed_run_trains_on_the_same_pairs(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "images" / "a" / "1.png").write_bytes(b"junk")
    damage(folders / "conds" / "b" / "6.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)  # the second one is found while training
    config = tiny(
        model=tiny().model.replace(cond_channels=1).model_dump(), data={"unreadable": "skip"}, preview_per_class=0,
        validation_share=0.2, validation_every_images=20,
    )  # fmt: skip

    def train(run: str, total: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
        data = opened(folders)
        assert len(data.labels) == COUNT - 1
        loop.train(resolve(config.replace(total_images=total), data), data, folders / run, resume=resume)
        return weights(checkpoints(folders / run)[-1])

    whole = train("whole", config.total_images)
    train("parts", 20)
    parts = train("parts", config.total_images, resume=True)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
