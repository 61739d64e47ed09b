"""The index of a large folder: files that have not changed are not read again, changed ones are noticed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data import DataConfig, DataError, Dataset, checking, open_dataset
from trainer.data.image_file import DIGESTED_WHOLE_BYTES


@pytest.fixture(autouse=True)
def _small_folders_are_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "INDEXED_FILES", 1)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose header is read, and of those that are decoded by the checks."""
    names: list[str] = []
    for function in ("inspect", "check_whole"):
        original = getattr(checking, function)

        def counting(path: Path, *rest: Any, original: Any = original, function: str = function) -> Any:
            names.append(f"{function} {path.name}")
            return original(path, *rest)

        monkeypatch.setattr(checking, function, counting)
    return names


def put(path: Path, grey: int = 90, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


def opened(tmp_path: Path, channels: int = 1, **options: Any) -> Dataset:
    return open_dataset(tmp_path / "data", 8, channels, DataConfig(**options), cache=tmp_path / "cache")


def test_an_unchanged_folder_is_not_read_again(tmp_path: Path, read: list[str]) -> None:
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        put(tmp_path / "data" / name)
    put(tmp_path / "data" / "b" / "1.png", size=(8, 30))
    first = opened(tmp_path)
    assert len(read) == 8
    read.clear()
    again = opened(tmp_path)
    assert read == []
    assert (again.description, again.summary) == (first.description, first.summary)
    (index,) = (tmp_path / "cache").iterdir()
    assert f"index of the files: {index}" in again.summary
    assert np.array_equal(again.images(np.arange(4)), first.images(np.arange(4)))


def test_only_changed_files_are_read_again(tmp_path: Path, read: list[str]) -> None:
    for number in range(5):
        put(tmp_path / "data" / "a" / f"{number}.png")
    before = opened(tmp_path).description
    read.clear()
    (tmp_path / "data" / "a" / "0.png").unlink()
    put(tmp_path / "data" / "a" / "3.png", grey=20)
    put(tmp_path / "data" / "a" / "9.png")
    now = opened(tmp_path).description
    assert sorted(set(read)) == ["check_whole 3.png", "check_whole 9.png", "inspect 3.png", "inspect 9.png"]
    assert now["content_sha256"] != before["content_sha256"]


def test_what_the_checks_depend_on_has_an_index_of_its_own(tmp_path: Path, read: list[str]) -> None:
    put(tmp_path / "data" / "a" / "0.png")
    for options in ({"channels": 1}, {"channels": 3}, {"value_range": (0, 255)}):
        read.clear()
        opened(tmp_path, **options)
        assert read


def test_an_interrupted_check_continues_at_the_next_start(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        put(tmp_path / "data" / "a" / f"{number}.png")
    monkeypatch.setattr(checking, "FILES_PER_TASK", 1)
    counting = vars(checking)["inspect"]

    def interrupted(path: Path, *rest: Any) -> Any:
        if path.name == "5.png":
            raise KeyboardInterrupt
        return counting(path, *rest)

    monkeypatch.setattr(checking, "inspect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    monkeypatch.setattr(checking, "inspect", counting)
    read.clear()
    opened(tmp_path)
    assert [name for name in sorted(read) if name.startswith("inspect")] == [f"inspect {n}.png" for n in range(5, 9)]


def test_unreadable_files_are_read_at_every_start(tmp_path: Path) -> None:
    put(tmp_path / "data" / "a" / "0.png")
    put(tmp_path / "data" / "a" / "1.png").write_bytes(b"junk")
    for _ in range(2):
        with pytest.raises(DataError, match=r"1\.png"):
            opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_a_damaged_index_is_built_again(tmp_path: Path, read: list[str], content: bytes) -> None:
    put(tmp_path / "data" / "a" / "0.png")
    opened(tmp_path)
    (index,) = (tmp_path / "cache").iterdir()
    index.write_bytes(content)
    read.clear()
    opened(tmp_path)
    assert len(read) == 2
    read.clear()
    opened(tmp_path)
    assert read == []


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "data" / "a" / "0.png")
    (tmp_path / "cache").write_text("a file")
    assert "index of the files" not in opened(tmp_path).summary
    assert "warning: the index of the files cannot be kept for the next start" in capsys.readouterr().err


@pytest.mark.parametrize("size", [100, DIGESTED_WHOLE_BYTES + 1, 10 * DIGESTED_WHOLE_BYTES])
def test_the_same_files_elsewhere_are_the_same_data_and_a_mended_one_of_equal_size_is_not(
    tmp_path: Path, size: int
) -> None:
    """A copy has other modification times; in a large file, whole parts are compared, so a new content is noticed."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, size), dtype=np.uint8)
    path = tmp_path / "data" / "a" / "0.bmp"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    before = opened(tmp_path).description
    os.utime(path, ns=(1, 1))
    assert opened(tmp_path).description == before
    Image.fromarray(255 - pixels).save(path)
    now = opened(tmp_path).description
    assert now["sizes_sha256"] == before["sizes_sha256"]
    assert now["content_sha256"] != before["content_sha256"]
