"""Unreadable images end the run, or are left out and replaced as a function of the data only."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from formats import png_data
from formats.picture_data import HAS_ALL_DATA
from tests.pictures import chunk, jpeg_announcing
from tests.unit.trainer.test_trainer import tiny
from trainer.data import DataConfig, DataError, Dataset, checking, open_dataset
from trainer.data.image_file import check_whole
from trainer.validation import held_out


def folder(tmp_path: Path) -> Path:
    for number in range(8):
        path = tmp_path / "data" / "ab"[number // 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * number).save(path)
    return tmp_path / "data"


def damage(path: Path) -> None:
    """Write a PNG with a good header and end, whose pixels are damaged."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    data[1000:1100] = bytes(100)
    path.write_bytes(data)


def opened(path: Path, **options: Any) -> Dataset:
    return open_dataset(path, 8, 1, DataConfig(**options))


def levels(data: Dataset, indices: Any) -> list[int]:
    return data.images(np.array(indices))[:, 0, 0, 0].tolist()


def test_those_found_before_the_first_step_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path)
    damage(path / "a" / "1.png")
    (path / "b" / "6.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"2 of 8 images .* leave out such files with --set data.unreadable=skip"):
        opened(path)
    data = opened(path, unreadable="skip")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert levels(data, np.arange(6)) == [0, 20, 30, 40, 50, 70]
    assert "6 images 8x8; 2 classes: a (3), b (3); skipped: 2 unreadable" in data.summary
    error = capsys.readouterr().err
    assert "warning: 2 of 8 images cannot be read and are skipped:" in error
    assert "1.png: " in error
    assert "6.png: it is damaged" in error
    (path / "b" / "6.png").unlink()
    assert opened(path, unreadable="skip").description == data.description


def short_png() -> bytes:
    """Return a PNG of 8x8 pixels whose header announces 8x12."""
    content = io.BytesIO()
    Image.new("L", (8, 8), 90).save(content, "PNG")
    header = struct.pack(">IIBBBBB", 8, 12, 8, 0, 0, 0, 0)
    return content.getvalue()[:8] + chunk(b"IHDR", header) + content.getvalue()[8 + 25 :]


def short_jpeg(**options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(content, "JPEG", **options)
    return jpeg_announcing(content.getvalue(), 8, 12)


@pytest.mark.parametrize("content", [short_png(), short_jpeg(), short_jpeg(progressive=True)], ids=["png", "jpg", "p"])
def test_a_file_that_announces_more_rows_than_it_has_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # Pillow fills up the missing rows
    path = folder(tmp_path)
    (path / "a" / "1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png: it is damaged or truncated: its header announces 8x12 pixels"):
        opened(path)
    assert len(opened(path, unreadable="skip").labels) == 7
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    assert levels(opened(path, unreadable="skip"), [1]) == [20]  # the next of its class


def test_each_image_is_checked_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    (path / "a" / "1.png").write_bytes(short_png())
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data, checked = opened(path, unreadable="skip"), []

    def has_all_data(content: bytes) -> bool:
        checked.append(content)
        return png_data.has_all_data(content)

    monkeypatch.setitem(HAS_ALL_DATA, "PNG", has_all_data)
    assert levels(data, [0, 5, 1]) == [0, 50, 20]
    assert levels(data, [0, 5, 1]) == [0, 50, 20]
    contents = [(path / name).read_bytes() for name in ("a/0.png", "b/5.png", "a/1.png", "a/2.png")]
    assert sorted(checked) == sorted([*contents, contents[2]])  # the unreadable one each time


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 2}),
        ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (16, 16), 40)]}),
        ("PNG", "RGBA", {}),
        ("PNG", "1", {}),
        ("PNG", "L", {"save_all": True, "append_images": [Image.new("L", (8, 8), 40)]}),
    ],
)
def test_whole_files_of_other_kinds_stay_readable(
    tmp_path: Path, kind: str, mode: str, options: dict[str, Any]
) -> None:
    Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode).save(tmp_path / "a.png", kind, **options)
    check_whole(tmp_path / "a.png", "L", DataConfig())


def test_without_a_readable_image_there_is_nothing_to_skip(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(2):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="2 of 2 images cannot be read; repair or remove them:"):
        opened(tmp_path, unreadable="skip")


def test_those_found_later_are_replaced_by_the_next_of_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path)
    damage(path / "a" / "2.png")
    damage(path / "a" / "3.png")
    damage(path / "b" / "7.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data = opened(path, unreadable="skip")
    assert len(data.labels) == 8
    capsys.readouterr()
    assert levels(data, [2, 3, 7, 7, 1]) == [0, 0, 40, 40, 10]
    error = capsys.readouterr().err
    assert error.count("warning: ") == 3
    assert "2.png: " in error
    assert "0.png takes its place; unreadable images found so far: " in error
    assert "unreadable images found so far: 3" in error
    assert levels(data, [2]) == [0]
    assert "warning" not in capsys.readouterr().err  # each is reported once
    with pytest.raises(DataError, match=r"2\.png: .*--decode-all lists all such files"):
        opened(path).images(np.array([2]))


def test_a_class_without_a_readable_image_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path)
    for number in range(4, 8):
        damage(path / "b" / f"{number}.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    with pytest.raises(DataError, match=r"7\.png: .*; no image of its class can be read"):
        opened(path, unreadable="skip").images(np.array([7]))


@pytest.mark.parametrize("seed", range(4))
def test_training_and_held_out_images_do_not_replace_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for number in range(8):
        Image.new("L", (8, 8), 10 * number + 1).save(tmp_path / f"{number}.png")
    damage(tmp_path / "3.png")
    damage(tmp_path / "6.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data = open_dataset(tmp_path, 8, 1, DataConfig(unreadable="skip"), labelled=False)
    config = tiny(validation_share=0.5, validation_every_images=8, seed=seed)
    training, held = held_out(config, data)
    assert held is not None
    mine, theirs = (levels(part, np.arange(4)) for part in (training, held))
    assert {*mine, *theirs} == {1, 11, 21, 41, 51, 71}
    assert not set(mine) & set(theirs)


def test_a_part_without_a_readable_image_of_the_class_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path)
    damage(path / "a" / "1.png")
    monkeypatch.setattr(checking, "DECODED_FILES", 0)
    data = opened(path, unreadable="skip")
    assert levels(data.part(np.array([3, 1, 5])), [1, 0, 2]) == [30, 30, 50]
    assert levels(data.part(np.array([5, 1, 3, 0])).part(np.array([3, 1])), [1]) == [0]
    with pytest.raises(DataError, match=r"no image of its class can be read; --decode-all leaves out such images"):
        levels(data.part(np.array([1, 5])), [0])


@pytest.mark.parametrize("workers", [None, 1, 2, 5])
def test_images_do_not_depend_on_the_number_of_workers(tmp_path: Path, workers: int | None) -> None:
    data = opened(folder(tmp_path), workers=workers)
    for indices in ([], [3], [7, 0, 5, 5, 1, 2, 6]):
        assert levels(data, np.array(indices, int)) == [10 * index for index in indices]
