"""Several processes train what one process trains, and stop together; torchrun starts those of some tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from tests.counts import LONG
from tests.paths import ROOT
from tests.unit.trainer.forked_ranks import run_ranks, started_ranks
from tests.unit.trainer.test_resume import write_npz
from tests.unit.trainer.test_trainer import tiny, weights
from tests.waiting import PATIENCE_S, START_POLL_S, scaled, until
from trainer import loop, ranks
from trainer.data import open_dataset
from trainer.errors import TrainError
from trainer.loop import resolve
from trainer.ranks import OneProcess, main_first
from trainer.run_folder import EMA_FOLDER, LOG_FILE, checkpoints

FIELDS = {
    "model.channel_mult": "[1]", "model.attention_resolutions": "[]", "model.image_size": "8", "batch_size": "8",
    "total_images": "48", "preview_per_class": "0", "diffusion.num_timesteps": "50", "precision": "float32",
    "lr_warmup_images": "0", "log_every_batches": "1", "timestep_sampler": "loss_second_moment", "loss": "vlb",
    "horizontal_flip": "true", "checkpoint_every_images": "24", "lr": "1e-3", "lr_schedule": "constant",
}  # fmt: skip

ONLY_LONG = pytest.mark.skipif(not LONG, reason="most of a minute: IDDPM_TEST_LONG=1")


def arguments(data: Path, run: Path, *options: str, **changes: str) -> list[str]:
    sets = [part for name, value in {**FIELDS, **changes}.items() for part in ("--set", f"{name}={value}")]
    return ["train", "fashion32", "--data", str(data), "--out", str(run), *sets, *options]


def command(data: Path, run: Path, *options: str, world: int, **changes: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [*torchrun, "-m", "cli.main", *arguments(data, run, *options, **changes)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def train(data: Path, run: Path, *options: str, world: int, **changes: str) -> str:
    done = subprocess.run(
        command(data, run, *options, world=world, **changes),
        env=environment(), capture_output=True, encoding="utf-8", timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def curve(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("ranks") / "toy.npz")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train_alone(data, run)
    return run


def train_alone(data: Path, run: Path, *options: str, **changes: str) -> None:
    """Train in this process."""
    result = CliRunner().invoke(app, arguments(data, run, *options, **changes))
    assert result.exit_code == 0, result.output


def assert_same_training(run: Path, alone: Path) -> None:
    for mine, theirs in zip(curve(run), curve(alone), strict=True):
        assert mine["images"] == theirs["images"]
        for name in ("loss", "mse", "vb_bpd", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["images"], name)
    trained = weights(checkpoints(run)[-1])
    for name, tensor in weights(checkpoints(alone)[-1]).items():
        assert torch.allclose(trained[name], tensor, rtol=1e-3, atol=2e-5), name


def test_two_processes_go_on_as_one_would_with_the_whole_batch(data: Path, alone: Path, tmp_path: Path) -> None:
    """Gradients are averaged in another order, so that losses agree to 1e-4 over these steps, and are not equal."""
    train_alone(data, tmp_path / "run", total_images="24")
    log = tmp_path / "log"
    codes = run_ranks(arguments(data, tmp_path / "run", "--resume", microbatch_size="2"), 2, log)
    output = log.read_text(encoding="utf-8")
    assert codes == [0, 0], output
    assert_same_training(tmp_path / "run", alone)
    assert output.count("trained: ") == 1


@pytest.mark.skipif(not LONG, reason="starts many processes")
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_trains_what_one_trains(data: Path, alone: Path, tmp_path: Path, world: int) -> None:
    train(data, tmp_path / "run", world=world)
    assert_same_training(tmp_path / "run", alone)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    train_alone(data, tmp_path / "run", "--resume")
    assert_same_training(tmp_path / "run", alone)


def workers(parent: int) -> dict[int, int]:
    """Return the process of each rank below torchrun."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        numbers = [int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")]
        if numbers:
            found[numbers[0]] = int(process.name)
    return found


def has_logged(run: Path, images: int) -> bool:
    log = run / LOG_FILE
    return log.exists() and f'"images": {images}' in log.read_text(encoding="utf-8")


def test_a_killed_run_continues_bit_identically(data: Path, tmp_path: Path) -> None:
    """The moment of the kill is not chosen: it may be inside a step, or a checkpoint."""
    averages = {"ema_decay": "0.999,0.9", "ema_sigma_rels": "0.1"}
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log"
    endless = arguments(data, run, total_images="10000000", checkpoint_every_images="80", **averages)
    with started_ranks(endless, 1, log) as (process,):
        until(lambda: has_logged(run, 104) or not process.is_alive())
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text(encoding="utf-8")
    logged, saved = curve(run), int(checkpoints(run)[-1].name)
    assert logged[-1]["images"] > 80
    end = {"total_images": str(saved + 40), "checkpoint_every_images": "80"}
    train_alone(data, run, "--resume", **end, **averages)
    train_alone(data, whole, **end, **averages)
    for killed, undisturbed in zip(curve(run), curve(whole), strict=True):
        timed = {"images_per_second": 0, "data_wait": 0}
        assert {**killed, **timed} == {**undisturbed, **timed}
    mine, theirs = checkpoints(run)[-1], checkpoints(whole)[-1]
    assert int(mine.name) == saved + 40
    trained = weights(mine)  # with averages, optimiser and timestep sampler
    assert {name.split(".")[0] for name in trained} >= {"raw", "optimizer", "timestep_sampler", "average"}
    for name, tensor in weights(theirs).items():
        assert torch.equal(trained[name], tensor), name
    progress = Path("state") / "progress.json"
    assert json.loads((mine / progress).read_text()) == json.loads((theirs / progress).read_text())
    for snapshot in (whole / EMA_FOLDER).iterdir():
        assert (run / EMA_FOLDER / snapshot.name).read_bytes() == snapshot.read_bytes()
    assert not [path for path in run.rglob("*") if ".new-" in path.name]


def test_the_others_stop_when_the_main_process_is_killed(data: Path, tmp_path: Path) -> None:
    """Nothing but the lost connection tells them: these processes have no torchrun."""
    run, log = tmp_path / "run", tmp_path / "log"
    endless = arguments(data, run, total_images="10000000", checkpoint_every_images="80")
    with started_ranks(endless, 2, log) as (main, other):
        until(lambda: has_logged(run, 160) or not main.is_alive())
        main.kill()
        other.join(scaled(30))
        assert other.exitcode == 1, log.read_text(encoding="utf-8")
    output = " ".join(log.read_text(encoding="utf-8").split())
    assert "rank 1 of 2 lost the connection to another process, which has ended or was killed" in output
    assert "start the same command again with --resume" in output
    saved = int(checkpoints(run)[-1].name)
    train_alone(data, run, "--resume", total_images=str(saved + 8))


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=ONLY_LONG),
        pytest.param(1, signal.SIGTERM, marks=ONLY_LONG),
    ],
)
def test_all_processes_stop_with_one(data: Path, tmp_path: Path, rank: int, number: signal.Signals) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(data, run, world=2, total_images="10000000", checkpoint_every_images="80"),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
    ) as process:  # fmt: skip
        until(lambda: has_logged(run, 160) or process.poll() is not None, START_POLL_S)
        victim = workers(process.pid)[rank]
        started = time.monotonic()
        os.kill(victim, number)
        output = process.communicate(timeout=PATIENCE_S)[1]
        took = time.monotonic() - started
    assert process.returncode != 0
    assert took < scaled(30), output
    assert not workers(process.pid)
    if number == signal.SIGKILL:
        assert f"rank {1 - rank} of 2 lost the connection to another process" in output
    else:
        assert "to continue: iddpm train fashion32" in output
        seen = int(checkpoints(run)[-1].name)
        assert seen == curve(run)[-1]["images"]
        assert f"stopped after {seen} images" in output


def test_all_processes_roll_back_together(data: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    again = arguments(data, run, "--resume", total_images="96", lr="1e7", max_rollbacks="1")
    codes = run_ranks(again, 2, tmp_path / "log")
    output = " ".join((tmp_path / "log").read_text(encoding="utf-8").split())
    assert codes == [1, 1], output
    assert output.count("Rolled back to the weights after 48 images") == 1, output
    assert "after 1 rollback" in output
    assert "lost the connection" not in output
    newest = weights(checkpoints(run)[-1])
    for name, tensor in weights(checkpoints(alone)[-1]).items():
        assert torch.equal(newest[name], tensor), name


def ends_by_itself(monkeypatch: pytest.MonkeyPatch, waits: bool) -> bool:
    """Return whether a process that got a signal, and works or waits for others for longer than it may, ends."""
    monkeypatch.setattr(ranks, "STOP_WITHIN", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    waiting = ranks.Waiting()
    thread = threading.Thread(target=ranks.end_if_stuck, args=(0, waiting, lambda: True))
    with waiting.for_others() if waits else nullcontext():
        thread.start()
        ended.wait(PATIENCE_S if waits else 1.5)
    waiting.agreed.set()
    thread.join()
    return ended.is_set()


def test_only_a_process_that_waits_for_others_ends_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends_by_itself(monkeypatch, waits=True)
    assert not ends_by_itself(monkeypatch, waits=False)


class TwoOfThese(OneProcess):
    world = 2


@pytest.mark.parametrize(
    ("batch_size", "micro", "message"),
    [
        (3, None, r"batch_size \(3\) must be a multiple of the number of processes, 2"),
        (8, 8, "microbatch_size must divide the 4 images per step of each of 2 processes; got 8"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(
    data: Path, tmp_path: Path, batch_size: int, micro: int | None, message: str
) -> None:
    dataset = open_dataset(data, 8, 1)
    config = resolve(tiny(batch_size=batch_size, microbatch_size=micro), dataset)
    with pytest.raises(TrainError, match=message):
        loop.train(config, dataset, tmp_path / "run", ranks=TwoOfThese())
    assert not (tmp_path / "run").exists()


def test_rows_are_gathered_in_the_order_of_the_batch() -> None:
    rows = np.arange(12)
    parts = [torch.from_numpy(rows[rank::3]) for rank in range(3)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), torch.from_numpy(rows))


class Pair(OneProcess):
    """One of two processes, which are threads here."""

    world = 2

    def __init__(self, rank: int, values: list[int], barrier: threading.Barrier) -> None:
        super().__init__("cpu")
        self.rank, self.main = rank, rank == 0
        self._values, self._barrier = values, barrier

    def highest(self, value: int) -> int:
        self._values[self.rank] = value
        self._barrier.wait(PATIENCE_S)
        return max(self._values)


@pytest.mark.parametrize("fails", [False, True])
def test_the_main_process_opens_the_data_first(fails: bool) -> None:
    done: list[int] = []
    values, barrier = [0, 0], threading.Barrier(2)

    def open_data(rank: int) -> str:
        if rank == 0:
            time.sleep(0.1)
            if fails:
                raise ValueError("unreadable")
        done.append(rank)
        return "data"

    with ThreadPoolExecutor(2) as pool:
        others, main = (
            pool.submit(main_first, Pair(rank, values, barrier), partial(open_data, rank)) for rank in (1, 0)
        )
        if not fails:
            assert (main.result(), others.result(), done) == ("data", "data", [0, 1])
            return
        with pytest.raises(ValueError, match="unreadable"):
            main.result()
        with pytest.raises(TrainError, match="the main process could not read the data"):
            others.result()
    assert done == []


def test_unreadable_data_end_all_processes_with_one_reason(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=[0, 0])
    codes = run_ranks(arguments(tmp_path / "a.npz", tmp_path / "run"), 2, tmp_path / "log")
    output = " ".join((tmp_path / "log").read_text(encoding="utf-8").split())
    assert codes == [1, 1], output
    assert output.count("choose --set model.image_channels=3") == 1, output
    assert "lost the connection" not in output
    assert not (tmp_path / "run").exists()
