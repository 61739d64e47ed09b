"""Bulk generation through Ray Data on a real cluster of two nodes: the files of `iddpm generate`, whatever dies.

It takes minutes and needs the extra ray, so that only `make test-long` runs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from formats.generated_folder import read_generation
from tests.counts import LONG
from tests.fakes import tiny_checkpoint
from tests.integration.ray_cluster import TwoNodes, two_nodes
from tests.paths import ROOT
from tests.waiting import PATIENCE_S, until

if not LONG:
    pytest.skip("takes minutes: make test-long", allow_module_level=True)
pytest.importorskip("ray.data", reason="needs the extra ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and processes to the garbage collector

SHARDS, SHARD_SIZE = 8, 8
OPTIONS = ["--num", str(SHARDS * SHARD_SIZE), "--shard-size", str(SHARD_SIZE), "--steps", "40", "--cfg-scale", "1"]
OPTIONS += ["--seed", "5", "--image-index", "7", "--class", "Cat", "--class", "Ape"]
TARS, TABLES = ("--format", "webdataset"), ("--format", "parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with two_nodes(tmp_path_factory, IDDPM_MAX_ROWS="2") as nodes:
        yield nodes


@pytest.fixture(scope="module")
def expected(cluster: TwoNodes, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of `TARS`."""
    return generated(model, tmp_path_factory.mktemp("expected") / "out", *TARS)


def generated(model: Path, out: Path, *more: str) -> dict[str, bytes]:
    """Return the files that `iddpm generate` writes with the threads of a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IDDPM_THREADS", "1")
        result = CliRunner().invoke(app, ["generate", str(model), "--out", str(out), *OPTIONS, *more])
    assert result.exit_code == 0, result.output
    return files(out)


class Driver:
    """A running command."""

    def __init__(
        self,
        cluster: TwoNodes,
        model: Path,
        out: Path,
        *more: str,
        form: Sequence[str] = TARS,
        program: Sequence[str] = ("-m", "deploy.ray.bulk"),
    ) -> None:
        self.out = out
        command = [sys.executable, *program, str(model), "--out", str(out), "--address", cluster.address]
        self.log = out.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *OPTIONS, *form, *more], cwd=ROOT, stdout=log, stderr=log)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, shards: int) -> None:
        """Wait until this number of shards is written, and more are to be."""
        until(lambda: len(shards_of(self.out)) >= shards or self.process.poll() is not None, poll_s=0.05)
        assert self.process.poll() is None, self.output()
        assert not read_generation(self.out).complete

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def shards_of(out: Path) -> dict[str, int]:
    """Return the shards that are whole, and the number that tells whether a file is the same."""
    return {path.name: path.stat().st_ino for path in out.glob("*.tar") if not path.name.startswith(".")}


def test_a_worker_is_killed_and_the_files_equal_those_of_iddpm_generate(
    cluster: TwoNodes, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    with Driver(cluster, model, tmp_path / "out") as driver:  # as many workers as fit: one on each node
        driver.wait_for(1)
        (worker,) = cluster.workers("ray::MapWorker")
        os.kill(worker, signal.SIGKILL)
        assert driver.end() == 0, driver.output()
    assert files(tmp_path / "out") == expected


def test_workers_with_half_a_cpu_each_write_the_tables_of_iddpm_generate(
    cluster: TwoNodes, model: Path, tmp_path: Path
) -> None:
    with Driver(cluster, model, tmp_path / "out", "--cpus", "0.5", form=TABLES) as driver:
        until(lambda: len(cluster.workers("ray::MapWorker")) == 2 or driver.process.poll() is not None, poll_s=0.05)
        assert driver.process.poll() is None, driver.output()  # two workers on a node of one CPU
        assert driver.end() == 0, driver.output()
    found = files(tmp_path / "out")
    assert len([name for name in found if name.endswith(".parquet")]) == SHARDS
    assert found == generated(model, tmp_path / "expected", *TABLES)


FEW_BATCHES_AT_ONCE = """
from deploy.ray import bulk

bulk.BATCHES_PER_WORKER = 2
bulk.app()
"""


def test_batches_that_ray_is_given_in_parts_become_the_same_files(
    cluster: TwoNodes, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    with Driver(cluster, model, tmp_path / "out", program=("-c", FEW_BATCHES_AT_ONCE)) as driver:
        assert driver.end() == 0, driver.output()
    assert files(tmp_path / "out") == expected


def test_the_driver_is_stopped_then_killed_and_the_same_command_continues(
    cluster: TwoNodes, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with Driver(cluster, model, out) as driver:
        driver.wait_for(1)
        driver.process.terminate()
        assert driver.end() == 128 + signal.SIGTERM
        assert f"stopped; to continue: python -m deploy.ray.bulk {model}" in driver.output()
    stopped = shards_of(out)
    assert 0 < len(stopped) < SHARDS

    with Driver(cluster, model, out) as driver:
        driver.wait_for(len(stopped) + 1)
        driver.process.kill()
        driver.end()
    killed = shards_of(out)
    assert len(killed) < SHARDS
    assert stopped.items() <= killed.items()

    with Driver(cluster, model, out) as driver:
        assert driver.end() == 0, driver.output()
    assert killed.items() <= shards_of(out).items()  # not generated again
    assert files(out) == expected


def test_a_node_dies_and_the_workers_that_are_left_finish(
    cluster: TwoNodes, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    with Driver(cluster, model, tmp_path / "out", "--workers", "2") as driver:
        driver.wait_for(1)
        cluster.kill_node()
        try:
            assert driver.end() == 0, driver.output()
        finally:
            cluster.add_node()
    assert files(tmp_path / "out") == expected


def test_wrong_options_are_refused_in_one_line_before_anything_is_written(
    cluster: TwoNodes, model: Path, tmp_path: Path
) -> None:
    with Driver(cluster, model, tmp_path / "out", "--class", "Dog") as driver:
        assert driver.end() == 1
        assert 'error: class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"' in driver.output().splitlines()
    assert not driver.out.exists()
