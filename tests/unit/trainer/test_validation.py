"""Held-out data in a data set of their own: what is refused, the loss, early stopping, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from formats.checkpoint_config import read_config
from tests.unit.trainer.test_pairs import folders
from tests.unit.trainer.test_resume import write_npz
from tests.unit.trainer.test_trainer import tiny
from trainer import loop
from trainer.batches import read_pairs
from trainer.config import TrainConfig
from trainer.data import Dataset, IntArray, open_dataset
from trainer.errors import Stopped, TrainError
from trainer.loop import resolve
from trainer.objective import DiffusionObjective, objective_of
from trainer.optimisation import Optimisation
from trainer.ranks import OneProcess
from trainer.run_folder import checkpoints
from trainer.validation import Validation, held_out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "data.npz")


@pytest.fixture
def held(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "held.npz", seed=1)


def opened(path: Path) -> Dataset:
    return open_dataset(path, 8, 1)


def validated(**changes: Any) -> TrainConfig:
    return tiny(validation_every_images=8, preview_per_class=0, ema_decay=0.0, **changes)


def train(config: TrainConfig, data: Path, held: Path | None, run: Path, **options: Any) -> Path:
    dataset, validation = opened(data), None if held is None else opened(held)
    return loop.train(resolve(config, dataset, validation), dataset, run, validation=validation, **options)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "validation.jsonl").read_text().splitlines()]


def test_all_data_are_trained_on_and_at_most_so_many_others_judge(data: Path, held: Path) -> None:
    config = validated(validation_images=5)
    training, part = held_out(config, opened(data), opened(held))
    assert part is not None
    assert (len(training.labels), len(part.labels)) == (24, 5)
    theirs = opened(held).images(np.arange(24))
    assert all(any(np.array_equal(image, other) for other in theirs) for image in part.images(np.arange(5)))
    other = held_out(config.replace(seed=1), opened(data), opened(held))[1]
    assert other is not None
    assert not np.array_equal(part.images(np.arange(5)), other.images(np.arange(5)))


def test_an_overfitted_run_ends_early(data: Path, held: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = validated(total_images=400, stop_after_worse=2, lr=0.05, checkpoint_every_images=1000)
    trained = read_config(train(config, data, held, run))
    best = int(np.argmin(losses(run)))
    assert len(losses(run)) == best + 3  # two worse ones in a row
    assert trained.provenance["images_seen"] == 8 * len(losses(run))
    assert trained.provenance["validation_data"] == opened(held).description
    assert read_config(run / "best").provenance["images_seen"] == 8 * (best + 1)


def test_a_run_that_ended_early_trains_on_only_with_another_limit(data: Path, held: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = validated(total_images=400, stop_after_worse=2, lr=0.05, checkpoint_every_images=1000)
    train(config, data, held, run)
    ended = losses(run)
    for _ in range(2):
        train(config, data, held, run, resume=True)
        assert losses(run) == ended
    train(config.replace(total_images=8 * len(ended) + 8, stop_after_worse=None), data, held, run, resume=True)
    assert losses(run)[:-1] == ended


@pytest.mark.parametrize("killed_in", ["write_snapshot", "write_preview", "losses", "write_model", "append_line"])
def test_a_run_killed_after_a_checkpoint_makes_up_for_what_was_due(
    data: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    config = validated(checkpoint_every_images=16, ema_sigma_rels=(0.1,)).replace(preview_per_class=1)
    train(config, data, held, tmp_path / "whole")

    def killed_at_16(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            at_best = killed_in != "write_model" or arguments[0].name == "best"
            at_line = killed_in != "append_line" or arguments[0].name == "validation.jsonl"
            if at_best and at_line and [int(path.name) for path in checkpoints(tmp_path / "parts")] == [16]:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return run

    owner = {"losses": Validation, "write_preview": DiffusionObjective}.get(killed_in, loop)
    with monkeypatch.context() as patch:
        patch.setattr(owner, killed_in, killed_at_16(getattr(owner, killed_in)))
        with pytest.raises(KeyboardInterrupt):
            train(config, data, held, tmp_path / "parts")
    train(config, data, held, tmp_path / "parts", resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (parts / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
    assert (
        read_config(parts / "best").provenance["images_seen"] == read_config(whole / "best").provenance["images_seen"]
    )
    snapshots = [{path.name: path.read_bytes() for path in (run / "ema").iterdir()} for run in (whole, parts)]
    assert snapshots[0] == snapshots[1]
    assert len(snapshots[0]) == 3  # after 16, 32 and 40 images


class OneOfTwo(OneProcess):
    world = 2


@pytest.mark.parametrize(
    ("ranks", "micro", "size"), [(OneProcess("cpu"), None, 4), (OneOfTwo("cpu"), None, 2), (OneOfTwo("cpu"), 1, 1)]
)
def test_a_process_validates_as_many_images_at_once_as_it_trains_on(
    data: Path, held: Path, monkeypatch: pytest.MonkeyPatch, ranks: OneProcess, micro: int | None, size: int
) -> None:
    config = resolve(validated(microbatch_size=micro, validation_images=8), opened(data), opened(held))
    objective = objective_of(config, "cpu")
    network = objective.build()
    sizes: list[int] = []

    def read(dataset: Dataset, indices: IntArray) -> Any:
        sizes.append(len(indices))
        return read_pairs(dataset, indices)

    monkeypatch.setattr("trainer.validation.read_pairs", read)
    part = held_out(config, opened(data), opened(held))[1]
    assert part is not None
    Validation(config, part, objective, Optimisation(config, objective, network, ranks)).losses(network.state_dict())
    assert sizes == [size] * (8 // size)


def test_a_stopped_validation_is_made_when_the_run_is_resumed(
    data: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = validated(total_images=24)
    train(config, data, held, tmp_path / "whole")
    asked: list[bool] = []

    def ask_to_stop(dataset: Dataset, indices: IntArray) -> Any:
        asked.append(True)
        return read_pairs(dataset, indices)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.validation.read_pairs", ask_to_stop)
        with pytest.raises(Stopped, match="stopped after 8 images"):
            train(config, data, held, tmp_path / "run", stop=lambda: bool(asked))
    assert len(asked) == 1
    assert not (tmp_path / "run" / "validation.jsonl").exists()
    train(config, data, held, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_held_out_data_that_do_not_fit_are_refused(data: Path, held: Path, tmp_path: Path) -> None:
    others = write_npz(tmp_path / "others.npz", names=("x", "y"))
    large = tmp_path / "large.npz"
    np.savez(large, images=np.zeros((3, 9, 7), np.uint8), labels=np.arange(3), classes=np.array(["x", "y", "z"]))
    for path, config, message in (
        (others, tiny(), "must have the classes of the data, in the same order: x, y, z; got x, y"),
        (large, tiny(), "all images for training are 6x6, and one for validation is 7x9"),
        (data, tiny(), "the data for validation are those for training"),
        (held, tiny(validation_share=0.1), "validation_share must be 0 with held-out data of their own; got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(config, opened(data), opened(path))
    resolve(tiny(class_conditional=False, label_dropout=0.0), opened(data), opened(others))


def test_a_resumed_run_needs_the_same_held_out_data(data: Path, held: Path, tmp_path: Path) -> None:
    train(validated(), data, held, tmp_path / "whole")
    train(validated(total_images=20), data, held, tmp_path / "parts")
    with pytest.raises(TrainError, match="was validated on a data set of its own; add --validation"):
        train(validated(), data, None, tmp_path / "parts", resume=True)
    other = write_npz(tmp_path / "other.npz", seed=2)
    with pytest.raises(TrainError, match=r"was validated on other data: sha256 was .*add --accept-changed-data"):
        train(validated(), data, other, tmp_path / "parts", resume=True)
    train(validated(), data, held, tmp_path / "parts", resume=True)
    first, second, _at_the_end_of_a_part, *rest = losses(tmp_path / "parts")
    assert [first, second, *rest] == losses(tmp_path / "whole")
    changed = train(
        validated(total_images=60), data, other, tmp_path / "parts", resume=True, accept_changed_data=True
    )  # fmt: skip
    (entry,) = (entry for entry in read_config(changed).provenance["resumed"] if "validation_data_before" in entry)
    assert entry["validation_data_before"] == opened(held).description


def test_held_out_data_may_be_added_on_resume(data: Path, held: Path, tmp_path: Path) -> None:
    train(validated(total_images=20), data, None, tmp_path / "run")
    train(validated(), data, held, tmp_path / "run", resume=True)
    assert len(losses(tmp_path / "run")) == 3  # after 24, 32 and 40 images


def test_the_command_reads_held_out_pairs_and_prints_how_to_continue(tmp_path: Path) -> None:
    for name in ("train", "held"):
        folders(tmp_path / name, ["c/a.png", "d/b.png"], ["c/a.png", "d/b.png"])
    (tmp_path / "held" / "images" / "c" / "a.png").write_bytes(
        (tmp_path / "held" / "conds" / "d" / "b.png").read_bytes()
    )
    sides = {
        "--data": "train/images", "--cond": "train/conds", "--validation": "held/images",
        "--validation-cond": "held/conds",
    }  # fmt: skip
    paths = {option: str(tmp_path / path) for option, path in sides.items()}
    command = ["train", "fashion32", "--set", "model.cond_channels=1", "--dry-run"]

    def run(*options: str) -> str:
        given = [part for option in options for part in (option, paths[option])]
        return CliRunner().invoke(app, [*command, *given]).output

    shown = run(*sides)
    assert "validation data: 2 images 8x8; 2 classes: c (1), d (1)" in shown
    assert "validation conditioning images: 2 images 8x8" in shown
    assert "must be a folder (--cond)" in " ".join(run("--data", "--cond", "--validation").split())
    assert "--validation-cond can only be used with --validation" in " ".join(
        run("--data", "--cond", "--validation-cond").split()
    )
