"""The headers of many files are read in processes, with the results of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.waiting import until
from trainer.data import DataConfig, DataError, checking, header_processes, open_dataset
from trainer.data.header_processes import read_in_processes
from trainer.data.image_file import inspect

ROOT = Path(__file__).parents[3]
FILES = 5


@pytest.fixture(autouse=True)
def _few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_processes, "MOST_PROCESSES", 1)
    monkeypatch.setattr(header_processes, "FILES_PER_TASK", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "a").mkdir(parents=True)
    for number in range(FILES):
        Image.new("L", (8 + number, 8), 40 * number).save(tmp_path / "data" / "a" / f"{number}.png")
    return tmp_path / "data"


def test_processes_and_threads_find_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a" / "3.png").write_bytes(b"junk")

    def described() -> tuple[dict[str, str | int], str]:
        opened = open_dataset(folder, 8, 1, DataConfig(unreadable="skip"), cache=folder.parent / "cache")
        return opened.description, opened.summary

    in_threads = described()
    monkeypatch.setattr(checking, "FILES_FOR_PROCESSES", 1)
    monkeypatch.setattr(checking, "inspect", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0, 1})
    assert described() == in_threads
    assert in_threads[0]["images"] == FILES - 1


def test_headers_have_the_order_of_the_files_and_errors_their_name(folder: Path) -> None:
    (folder / "a" / "2.png").write_bytes(b"")
    names = [f"a{os.sep}{number}.png" for number in range(FILES)]
    tasks = list(read_in_processes(folder, names, "L", DataConfig()))
    assert [len(task) for task in tasks] == [2, 2, 1]
    found = [header for task in tasks for header in task]
    with pytest.raises(DataError) as expected:
        inspect(folder / names[2], "L", DataConfig())
    assert str(found.pop(2)) == str(expected.value)
    assert found == [inspect(folder / names[number], "L", DataConfig()) for number in (0, 1, 3, 4)]


def end_at_once() -> None:
    """Be a process that is killed, for example because memory is short."""
    os._exit(9)


def test_a_process_that_is_killed_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_processes, "_begin", end_at_once)
    with pytest.raises(DataError, match="has ended; if memory was short"):
        list(read_in_processes(folder, ["a/0.png"], "L", DataConfig()))


MAIN = """
import multiprocessing, sys, time
from pathlib import Path
from trainer.data import DataConfig
from trainer.data.header_processes import read_in_processes
if __name__ == "__main__":
    reading = read_in_processes(Path(sys.argv[1]), ["a/0.png"], "L", DataConfig())
    next(reading)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(1000)
"""


def test_the_processes_end_when_the_main_process_is_killed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    main = subprocess.Popen(
        [sys.executable, tmp_path / "main.py", folder], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert main.stdout is not None
    try:
        children = [int(text) for text in main.stdout.readline().split()]
    finally:
        main.kill()
        main.wait()
        main.stdout.close()
    assert children
    until(lambda: not any(is_running(process) for process in children))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # an orphan may wait for its new parent
