"""Files that are written completely or not at all, leftovers of killed writers, and errors of the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from formats.atomic_file import write_file, write_files
from formats.atomic_folder import write_folder
from formats.disk_errors import disk_errors_name
from formats.leftovers import remove_leftovers

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Make writes that extend a file beyond a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    with longest_file(100), pytest.raises(OSError, match="File too large") as caught:
        write_file(path, b"new" * 100)
    assert caught.value.filename == str(path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"old"}


def save_tensors(path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, path / "a.safetensors")


def save_arrays(path: Path) -> None:
    np.savez(path / "a.npz", a=np.random.default_rng(0).random(1000))


def save_text(path: Path) -> None:
    (path / "a.txt").write_text("a" * 4000)


@pytest.mark.parametrize("write", [save_tensors, save_arrays, save_text])
def test_the_error_of_a_full_disk_names_the_folder_which_does_not_change(tmp_path: Path, write: object) -> None:
    assert callable(write)
    write_folder(tmp_path / "model", lambda at: (at / "old").touch())
    with longest_file(1000), pytest.raises(OSError, match="File too large") as caught:
        write_folder(tmp_path / "model", write)
    assert caught.value.filename == str(tmp_path / "model")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/old"]


def raise_behind(outer: type[Exception]) -> None:
    try:
        raise FULL
    except OSError as error:
        raise outer("cannot close while there is an open handle") from error


@pytest.mark.parametrize(
    "fail",
    [
        lambda: raise_behind(ValueError),
        lambda: raise_behind(zipfile.BadZipFile),
        lambda: (_ for _ in ()).throw(SafetensorError("Error: I/O error: No space left on device (os error 28)")),
        lambda: (_ for _ in ()).throw(SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No" })')),
    ],
)
def test_a_full_disk_is_the_same_error_from_every_library(fail: object) -> None:
    assert callable(fail)
    with pytest.raises(OSError, match="No space left on device: 'here'"), disk_errors_name(Path("here")):
        fail()


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(FileNotFoundError, match="x"), disk_errors_name(Path("here")):
        Path("x/y").read_bytes()
    with pytest.raises(ValueError, match="nothing to do with disks"), disk_errors_name(Path("here")):
        raise ValueError("nothing to do with disks")


def test_leftovers_of_killed_writers_are_removed_and_files_being_written_are_not(tmp_path: Path) -> None:
    dead, live = tmp_path / ".model.new-0000dead", tmp_path / ".model.new-0000beef"
    for folder in (dead, live, tmp_path / ".models.new-00000000"):
        (folder / "half").mkdir(parents=True)
    writer = os.open(live, os.O_RDONLY)
    fcntl.flock(writer, fcntl.LOCK_EX)
    write_folder(tmp_path / "model", lambda at: (at / "new").touch())
    os.close(writer)
    assert {path.name for path in tmp_path.iterdir()} == {"model", live.name, ".models.new-00000000"}


def test_many_files_are_written_with_one_listing_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = 0
    iterdir = Path.iterdir

    def counted(folder: Path) -> Iterator[Path]:
        nonlocal listed
        listed += 1
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", counted)
    for name in ("a", "other"):
        (tmp_path / f".{name}.new-0123abcd").write_bytes(b"left by a killed writer")
    contents = {name: name.encode() for name in ("a", "b", "c", "d", "e")}
    write_files(tmp_path, contents)
    assert listed <= 3  # one, and two for the leftover
    assert {path.name for path in iterdir(tmp_path)} == {*contents, ".other.new-0123abcd"}
    assert (tmp_path / "c").read_bytes() == b"c"


def test_a_lock_held_by_another_process_ends_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.leftovers.LOCK_SECONDS", 0.05)
    (tmp_path / ".file.new-1").touch()
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    write_file(tmp_path / "file", b"new")
    os.close(holder)
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.new-1"}


def test_the_old_folder_is_restored_after_a_writer_killed_between_its_renames(tmp_path: Path) -> None:
    for name in (".model.old-1", ".model.new-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name[7:10]).touch()
    remove_leftovers(tmp_path / "model")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/old"]


def test_the_next_writer_removes_all_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from formats.atomic_folder import write_folder\n"
        "write_folder(Path(sys.argv[1]), lambda at: os.kill(os.getpid(), 9))"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model"], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.new-")
    write_folder(tmp_path / "model", lambda at: (at / "new").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
