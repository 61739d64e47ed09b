"""The benchmark of reading images: it makes complete folders, and times each part of a start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import data_loading
from benchmarks.data_loading import measure_batches, measure_opening, write_many
from trainer.data import checking, opening
from trainer.data.index import Index


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CLASSES", 2), ("LINKED_PICTURES", 3), ("PICTURES", 2), ("BATCH", 2), ("REPEATS", 1)):
        monkeypatch.setattr(data_loading, name, value)
    monkeypatch.setattr(checking, "INDEXED_FILES", 1)


@pytest.mark.parametrize("distinct", [False, True])
def test_an_interrupted_folder_is_made_again(tmp_path: Path, distinct: bool) -> None:
    data = tmp_path / "files7"
    rest = tmp_path / "files7.unfinished" / "n00000000" / "99.png"
    rest.parent.mkdir(parents=True)
    rest.touch()
    write_many(tmp_path, data, 7, distinct=distinct)
    made = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    assert made == [f"n{number % 2:08d}/{number}.png" for number in (0, 2, 4, 6, 1, 3, 5)]
    assert {path.stat().st_nlink > 1 for path in data.rglob("*.png")} == {not distinct}
    assert not (tmp_path / "files7.unfinished").exists()


def test_the_parts_of_a_start_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner, name in ((opening, "list_images"), (checking, "_save"), (checking, "FILES_FOR_PROCESSES")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # measure_opening replaces them: restore them
    monkeypatch.setattr(Index, "of_files", Index.of_files)
    monkeypatch.setattr(Index, "recall", Index.recall)
    write_many(tmp_path, tmp_path / "data", 4, distinct=True)
    measure_opening(tmp_path / "data", tmp_path / "cache", in_threads=True)
    output = capsys.readouterr().out
    for part in ("all", "list", "stat", "read the index", "write the index", "headers, and the rest"):
        assert re.search(rf"^{part}: -?[\d.]+ s, processor -?[\d.]+ s$", output, re.MULTILINE), part
    assert len(list((tmp_path / "cache").glob("index-*"))) == 1


def test_batches_of_every_kind_of_file_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_loading, "WORKERS", (1,))
    measure_batches(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["png28", "png64", "jpeg64", "jpeg500"]
