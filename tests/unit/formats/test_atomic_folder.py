"""Folders that are written completely or not at all; test_checkpoint.py interrupts the writing in other ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats.atomic_folder import may_replace, write_folder

MARKER, FIELDS = "manifest.json", ("files", "parity")


def _write(text: str, folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "data.txt").write_text(text)
    (folder / MARKER).write_text("{}")


def test_a_folder_is_written_and_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "artifact"
    write_folder(folder, lambda at: _write("old", at))
    write_folder(folder, lambda at: _write("new", at))

    assert (folder / "inner" / "data.txt").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_it_does_not_exist_before_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"

    def write(at: Path) -> None:
        _write("new", at)
        assert at.parent == folder.parent
        assert not folder.exists()

    write_folder(folder, write)
    assert (folder / MARKER).is_file()


def test_a_failure_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    write_folder(folder, lambda at: _write("old", at))

    def write(at: Path) -> None:
        _write("new", at)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, write)
    assert (folder / "inner" / "data.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_only_a_folder_of_the_same_kind_or_an_empty_one_is_replaced(tmp_path: Path) -> None:
    assert may_replace(tmp_path / "nowhere", MARKER, FIELDS)
    assert may_replace(tmp_path, MARKER, FIELDS)
    (tmp_path / "cat.jpg").write_bytes(b"cat")
    assert not may_replace(tmp_path, MARKER, FIELDS)
    assert not may_replace(tmp_path / "cat.jpg", MARKER, FIELDS)
    for others in ("", "[]", "{}", '{"name": "my web app", "files": []}'):
        (tmp_path / MARKER).write_text(others)
        assert not may_replace(tmp_path, MARKER, FIELDS)
    (tmp_path / MARKER).write_text('{"files": {}, "parity": [], "format_version": 99}')
    assert may_replace(tmp_path, MARKER, FIELDS)
