"""Runs that end early, continue, or may not start: no work is lost, and every printed remedy works."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli.main import app
from formats.checkpoint_config import read_config
from tests.unit.formats.test_atomic_file import longest_file
from tests.unit.trainer.test_trainer import tiny, weights
from trainer import loop
from trainer.config import TrainConfig
from trainer.data import DataError, open_dataset
from trainer.errors import Stopped, TrainError
from trainer.log import Window, append_line
from trainer.loop import resolve
from trainer.resume import data_differences, resumed_config
from trainer.run_folder import checkpoints, claimed, ema_snapshot_file

IMAGES = 24


def write_npz(path: Path, seed: int = 0, names: tuple[str, ...] = ("x", "y", "z")) -> Path:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (IMAGES, 6, 6, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(IMAGES) % len(names), classes=np.array(names))
    return path


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "toy.npz")


def train(config: TrainConfig, data: Path, run: Path, **options: Any) -> Path:
    dataset = open_dataset(data, config.model.image_size, config.model.image_channels)
    return loop.train(resolve(config, dataset), dataset, run, **options)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a resumed run may change


def test_a_resumed_run_may_change_its_optimisation_and_records_the_change(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=20), npz, tmp_path / "run")
    changes = {"lr": 1e-5, "precision": "bfloat16", "grad_clip": 0.5, "microbatch_size": 2}
    train(tiny(total_images=24, **changes), npz, tmp_path / "run", resume=True)
    provenance = read_config(train(tiny(total_images=28, **changes), npz, tmp_path / "run", resume=True)).provenance
    assert provenance["resumed"] == [
        {
            "images_seen": 20,
            "changed": {
                "total_images": [20, 24],
                "microbatch_size": [None, 2],
                "lr": [1e-3, 1e-5],
                "grad_clip": [None, 0.5],
                "precision": ["float32", "bfloat16"],
            },
        },
        {"images_seen": 24, "changed": {"total_images": [24, 28]}},
    ]
    assert provenance["train_config"]["lr"] == 1e-5


def test_a_run_is_neither_overwritten_nor_resumed_with_another_model(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainError, match=r"no checkpoint to resume from; omit --resume"):
        train(tiny(), npz, run, resume=True)
    train(tiny(total_images=20), npz, run)
    before = files_in(run)
    with pytest.raises(TrainError, match="already contains a run"):
        train(tiny(), npz, run)
    with pytest.raises(TrainError, match=r"model\.dropout was 0\.1, would be 0\.3; seed was 0, would be 7"):
        train(tiny(seed=7, model={**tiny().model.model_dump(), "dropout": 0.3}), npz, run, resume=True)
    assert files_in(run) == before


def test_a_run_continues_with_its_own_configuration(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=4), npz, tmp_path / "run", command="iddpm train cifar10 --data toy.npz")
    assert resumed_config(tmp_path / "run", "cifar10") == resolve(tiny(total_images=4), open_dataset(npz, 8, 1))
    with pytest.raises(TrainError, match="was started from the preset cifar10; use that one instead of fashion32"):
        resumed_config(tmp_path / "run", "fashion32")


def test_a_resumed_run_has_each_log_line_once(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=20), npz, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"images": 24, "loss": "from a run that was killed after its checkpoint"}\n{"images": 32, "lo')
    train(tiny(total_images=32), npz, tmp_path / "run", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16, 20, 28, 32]


def test_a_checkpoint_of_adamw_that_was_not_fused_is_resumed(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions trained so on CPUs. The rest of the run differs by rounding: all weights by at most 1e-3."""
    config = tiny(channels_last=True, timestep_sampler="uniform", preview_per_class=0)
    whole = load_file(train(config, npz, tmp_path / "whole") / "model.safetensors")
    fused = torch.optim.AdamW
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", lambda *args, **kwargs: fused(*args, **{**kwargs, "fused": None}))
        train(config.replace(total_images=20), npz, tmp_path / "halves")
    halves = load_file(train(config, npz, tmp_path / "halves", resume=True) / "model.safetensors")
    gap, size = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([halves[name] - whole[name] for name in whole], list(whole.values()))
    )
    assert gap < 1e-3 * size


# --- data


def test_data_may_be_renamed_and_changed_only_if_accepted(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(total_images=4), npz, run)
    npz = npz.rename(tmp_path / "other.npz")
    train(tiny(total_images=8), npz, run, resume=True)
    write_npz(npz, seed=1)
    with pytest.raises(TrainError, match=r"other data: sha256 was .*add --accept-changed-data"):
        train(tiny(total_images=12), npz, run, resume=True)
    model = train(tiny(total_images=12), npz, run, resume=True, accept_changed_data=True)
    assert [entry.get("data_before", {}).get("file") for entry in read_config(model).provenance["resumed"]] == [
        None,
        "other.npz",
    ]
    train(tiny(total_images=16), npz, run, resume=True)  # these are the run's data from now on


def test_a_folder_may_be_renamed_and_removed_or_repaired_images_accepted(tmp_path: Path) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (8, 8), 40 * index).save(folder / name / f"{index}.png")
    train(tiny(total_images=4), folder, run)
    folder = folder.rename(tmp_path / "renamed")
    train(tiny(total_images=8), folder, run, resume=True)
    Image.effect_noise((8, 8), 50).save(folder / "a" / "0.png")
    with pytest.raises(TrainError, match="sizes_sha256 was"):
        train(tiny(total_images=12), folder, run, resume=True)
    (folder / "a" / "0.png").unlink()
    with pytest.raises(TrainError, match=r"images was 6, is 5\. .* add --accept-changed-data"):
        train(tiny(total_images=12), folder, run, resume=True)
    train(tiny(total_images=12), folder, run, resume=True, accept_changed_data=True)


def test_held_out_images_that_are_drawn_anew_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for index in range(6):
            Image.new("L", (8, 8), 40 * index).save(folder / name / f"{index}.png")
    config = tiny(validation_share=0.2, preview_per_class=0)
    train(config.replace(total_images=4), folder, run)
    Image.effect_noise((8, 8), 50).save(folder / "a" / "0.png")
    train(config.replace(total_images=8), folder, run, resume=True, accept_changed_data=True)
    assert "warning" not in capsys.readouterr().err
    (folder / "a" / "0.png").unlink()
    train(config.replace(total_images=12), folder, run, resume=True, accept_changed_data=True)
    warned = " ".join(capsys.readouterr().err.split())
    assert "the images that validation_share holds out are drawn anew" in warned
    assert "a new run with --validation" in warned
    train(config.replace(total_images=16), folder, run, resume=True)
    assert "drawn anew" not in capsys.readouterr().err


def test_data_with_other_classes_are_refused_in_any_case(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=4), npz, tmp_path / "run")
    write_npz(npz, names=("x", "z", "y"))
    with pytest.raises(TrainError, match=r"with the classes x, y, z; the data now have x, z, y\. Use data with"):
        train(tiny(total_images=8), npz, tmp_path / "run", resume=True, accept_changed_data=True)


def test_descriptions_of_data_are_compared_without_names_and_across_versions() -> None:
    before = {"folder": "a", "listing_sha256": "1" * 64, "images": 3}
    assert data_differences(before, {**before, "folder": "b", "new_in_a_later_version": 1}) == []
    assert data_differences(before, {**before, "images": 2}) == ["images was 3, is 2"]
    assert data_differences(before, {"file": "a.npz", "images": 3}) == ["a folder then, a file now"]


# --- divergence


def test_a_diverged_network_is_never_saved_and_the_printed_remedy_works(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(total_images=4, checkpoint_every_images=4), npz, run)
    with pytest.raises(TrainError, match=r"diverged after 8 images.*checkpoint after 4 images with --resume") as caught:
        train(tiny(total_images=40, checkpoint_every_images=4, lr=1e6), npz, run, resume=True)
    assert caught.value.resume_with == ["lr=0.0001", "grad_clip=1"]
    assert [int(path.name) for path in checkpoints(run)] == [4]
    train(tiny(total_images=8, lr=1e-4, grad_clip=1.0), npz, run, resume=True)
    assert all(tensor.isfinite().all() for tensor in weights(checkpoints(run)[-1]).values())


def test_a_run_that_diverges_before_its_first_checkpoint_starts_again(npz: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"no checkpoint yet: start again with --set lr=0\.0001") as caught:
        train(tiny(total_images=4, lr=1e6), npz, tmp_path / "run")
    assert caught.value.resume_with is None
    assert not (tmp_path / "run" / "model").exists()
    train(tiny(total_images=4, lr=1e-4), npz, tmp_path / "run")


def test_a_diverged_checkpoint_of_an_older_version_is_reported_with_the_previous_one(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    newest = checkpoints(tmp_path / "run")[-1]
    path = newest / "state" / "train_state.safetensors"
    save_file({name: tensor + 100 if "raw.out" in name else tensor for name, tensor in load_file(path).items()}, path)
    forget_hashes(newest)
    with pytest.raises(
        TrainError, match=r"had already diverged\. The checkpoint after 4 images is intact: to continue"
    ):
        train(tiny(total_images=12), tmp_path / "toy.npz", tmp_path / "run", resume=True)


# --- damaged checkpoints


def truncate(folder: Path) -> None:
    path = folder / "state" / "train_state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def spoil(folder: Path) -> None:
    tensors = load_file(folder / "state" / "train_state.safetensors")
    next(tensor for name, tensor in tensors.items() if name.startswith("raw."))[0] = torch.nan
    save_file(tensors, folder / "state" / "train_state.safetensors")
    forget_hashes(folder)


def forget_hashes(folder: Path) -> None:
    """Write a checkpoint as older versions did."""
    path = folder / "state" / "progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in progress.items() if name != "sha256"}))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    train(tiny(total_images=8, checkpoint_every_images=4), write_npz(folder / "toy.npz"), folder / "run")
    return folder


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "train_state.safetensors is damaged"),
        (flip_a_byte, "model.safetensors is damaged"),
        (spoil, "contains NaN or infinity, the run had diverged"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "state" / "progress.json").write_text("{}"), "no 'images_seen'"),
        (lambda folder: shutil.rmtree(folder / "state"), "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_reported_with_an_older_intact_one(
    two_checkpoints: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    run, config = tmp_path / "run", tiny(total_images=8, checkpoint_every_images=4)
    damage(checkpoints(run)[-1])
    with pytest.raises(TrainError, match=reason) as caught:
        train(config, tmp_path / "toy.npz", run, resume=True)
    newest = checkpoints(run)[-1]
    assert (
        f"The checkpoint after 4 images is intact: to continue from there, remove the later ones (rm -r {newest})"
        in str(caught.value)
    )
    shutil.rmtree(newest)
    train(config, tmp_path / "toy.npz", run, resume=True)
    whole = weights(checkpoints(two_checkpoints / "run")[-1])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(checkpoints(run)[-1]).items())


def test_without_an_intact_checkpoint_a_new_run_is_proposed(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for folder in checkpoints(tmp_path / "run"):
        truncate(folder)
    with pytest.raises(TrainError, match=r"No other checkpoint in .* is intact: start a new run, with"):
        train(tiny(), tmp_path / "toy.npz", tmp_path / "run", resume=True)


def test_checkpoints_of_older_versions_are_resumed(tmp_path: Path) -> None:
    """They have no hashes, one decay that is a number, and another prefix of the power-function averages."""
    data, config = write_npz(tmp_path / "toy.npz"), tiny(ema_sigma_rels=(0.1,), preview_per_class=0)
    for name in ("new", "old"):
        train(config.replace(total_images=8), data, tmp_path / name)
    newest = checkpoints(tmp_path / "old")[-1]
    forget_hashes(newest)
    described = json.loads((newest / "config.json").read_text())
    described["provenance"]["train_config"]["ema_decay"] = 0.9999
    (newest / "config.json").write_text(json.dumps(described))
    path = newest / "state" / "train_state.safetensors"
    save_file({name.replace("average.", "power_ema."): tensor for name, tensor in load_file(path).items()}, path)
    assert any(name.startswith("power_ema.0.1/") for name in load_file(path))
    for name in ("new", "old"):
        train(config.replace(total_images=12), data, tmp_path / name, resume=True)
    new, old = (weights(checkpoints(tmp_path / name)[-1]) for name in ("new", "old"))
    assert new.keys() == old.keys()
    assert all(torch.equal(tensor, old[name]) for name, tensor in new.items())


# --- stopping


def test_a_run_stopped_anywhere_continues_bit_identically(npz: Path, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    config = tiny(total_images=16, ema_sigma_rels=(0.1,))
    with pytest.raises(Stopped, match="after 8 images"):
        train(config, npz, tmp_path / "stopped", stop=lambda: next(asked))
    assert ema_snapshot_file(tmp_path / "stopped", 8).exists()
    train(config, npz, tmp_path / "stopped", resume=True)
    train(config, npz, tmp_path / "whole")
    stopped, whole = (weights(checkpoints(tmp_path / name)[-1]) for name in ("stopped", "whole"))
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())


def test_an_unreadable_image_loses_no_training(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(npz, 8, 1)
    images, calls = dataset.images, iter(range(9))

    def fail_third(indices: Any, draws: Any = None) -> Any:
        if next(calls) == 2:
            raise DataError("bee.png cannot be decoded")
        return images(indices, draws)

    monkeypatch.setattr(dataset, "images", fail_third)
    with pytest.raises(TrainError, match=r"bee\.png") as caught:
        loop.train(resolve(tiny(), dataset), dataset, tmp_path / "run")
    assert caught.value.resume_with == ()
    assert [int(path.name) for path in checkpoints(tmp_path / "run")] == [8]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["images"] == 8


FLAGS = [
    part
    for field in (
        "model.channel_mult=[1]", "model.attention_resolutions=[]", "model.image_size=8", "batch_size=4",
        "total_images=12", "preview_steps=2", "preview_per_class=1", "diffusion.num_timesteps=50",
        "precision=float32", "lr_warmup_images=0",
    )
    for part in ("--set", field)
]  # fmt: skip


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", "fashion32", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_a_checkpoint_and_print_the_command_to_continue(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    run, step = tmp_path / "my run", torch.optim.AdamW.step

    def step_and_signal(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        signal.raise_signal(number)

    handlers = signal.getsignal(number)
    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_signal)
    code, output = invoke("--data", str(npz), "--out", str(run), *FLAGS)
    assert code == 128 + number
    assert [int(path.name) for path in checkpoints(run)] == [4]
    assert signal.getsignal(number) is handlers
    _, _, command = output.partition("stopped after 4 images; to continue: iddpm train fashion32 ")
    assert command.startswith(f"--data {npz} --out '{run}' --resume --set")
    monkeypatch.undo()
    code, output = invoke("--data", str(npz), "--out", str(run), "--resume")
    assert (code, "trained: " in output) == (0, True), output


# --- one run, one folder


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "run", resume=False),
        pytest.raises(TrainError, match=r"run is in use by another training run \(process \d+ on .*\); use another"),
        claimed(tmp_path / "run", resume=False),
    ):
        pass
    with claimed(tmp_path / "run", resume=False):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model/cat.jpg", "model would be overwritten"),
        ("model/config.json", "model would be overwritten"),
        ("metrics.jsonl", "metrics.jsonl was not written by a run"),
        ("train_config.json", "train_config.json was not written by a run"),
        ("checkpoints", "checkpoints exists and is not a folder"),
        ("samples/000000000004.png", "samples would be overwritten"),
        ("", "--out must be a folder"),
    ],
)
def test_files_not_written_by_a_run_are_not_changed(npz: Path, tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(TrainError, match=message):
        train(tiny(total_images=4), npz, tmp_path / "run")
    assert [(entry, entry.read_text()) for entry in tmp_path.rglob("*") if entry.is_file() and entry != npz] == [
        (path, "{}")
    ]


def test_a_newer_model_keeps_the_classifier_and_removes_the_artifact_with_a_warning(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = tiny(total_images=4, validation_every_images=4, validation_share=0.1, preview_per_class=0)
    train(config, npz, run)
    for name in ("model", "best"):
        (run / name / "classifier").mkdir()
        (run / name / "classifier" / "config.json").write_text("{}")
    (run / "model" / "artifact").mkdir()
    capsys.readouterr()
    train(config.replace(total_images=8), npz, run, resume=True)
    assert read_config(run / "model").provenance["images_seen"] == 8
    assert sorted(path.name for path in (run / "model").iterdir()) == ["classifier", "config.json", "model.safetensors"]
    for name in ("model", "best"):
        assert (run / name / "classifier" / "config.json").read_text() == "{}"
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warned == [
        f"warning: {run / 'model'} has new weights; removed what belonged to the earlier ones: artifact; export the "
        "model again"
    ]

    linked = tmp_path / "classifier"
    (run / "model" / "classifier").rename(linked)
    (run / "model" / "classifier").symlink_to(linked)
    train(config.replace(total_images=12), npz, run, resume=True)
    assert (run / "model" / "classifier").readlink() == linked


@pytest.mark.parametrize("name", ["model", "best"])
def test_a_run_is_not_resumed_while_files_of_others_are_in_a_folder_that_it_replaces(
    npz: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    train(tiny(total_images=4, validation_every_images=4, validation_share=0.1, preview_per_class=0), npz, run)
    (run / name / "notes.txt").write_text("mine")
    (run / name / ".DS_Store").touch()
    code, output = invoke("--data", str(tmp_path / "absent"), "--out", str(run), "--resume")
    assert code == 1
    assert f"{run / name} is replaced with each newer model, and these files in it would be lost: notes.txt" in output
    assert (run / name / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_the_folder_of_the_run_is_checked_before_the_data(tmp_path: Path, dry: list[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "old" / "checkpoints" / "000000000004").mkdir(parents=True)
    for out, options, message in (
        ("file", [], "--out must be a folder"),
        ("file/run", [], f"--out must be a folder; {tmp_path / 'file'} is not one"),
        ("old", [], "old already contains a run; use another --out"),
        ("new", ["--resume"], "new holds no checkpoint to resume from"),
    ):
        options += ["--data", str(tmp_path / "absent"), "--out", str(tmp_path / out), *dry]
        code, output = invoke(*options)
        assert (code, message in output) == (1, True), output
    with claimed(tmp_path / "busy", resume=False):
        code, output = invoke("--data", str(tmp_path / "absent"), "--out", str(tmp_path / "busy"), *dry)
    assert (code, "busy is in use by another training run" in output) == (1, True), output
    assert not (tmp_path / "new").exists()


def test_a_run_that_never_reached_a_checkpoint_may_start_again(npz: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".000000000004.new-1234").mkdir(parents=True)
    (tmp_path / "run" / ".model.new-1234").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    (tmp_path / "run" / "train_config.json").write_text(tiny().model_dump_json())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"images": 2}\n')
    assert train(tiny(total_images=4), npz, tmp_path / "run").is_dir()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["images"] == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *(".lock", "checkpoints", "metrics.jsonl", "model", "notes.txt", "samples", "train_config.json")
    ]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000000004"]


# --- a full disk


def test_a_checkpoint_on_a_full_disk_ends_with_one_line_and_keeps_the_previous_one(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(total_images=4), npz, run)
    before = files_in(run / "checkpoints") | files_in(run / "model")
    with longest_file(50_000), pytest.raises(TrainError) as caught:
        train(tiny(total_images=8), npz, run, resume=True)
    assert str(caught.value) == (
        f"the checkpoint after 8 images could not be written, {run / 'checkpoints' / '000000000008'}: File too large; "
        "the one after 4 images is intact"
    )
    assert caught.value.resume_with == ()
    assert files_in(run / "checkpoints") | files_in(run / "model") == before
    assert not [path for path in run.rglob("*") if ".new-" in path.name]


def test_a_first_checkpoint_on_a_full_disk_leaves_a_folder_that_can_be_used_again(npz: Path, tmp_path: Path) -> None:
    with longest_file(50_000), pytest.raises(TrainError, match="File too large; there is no earlier one"):
        train(tiny(total_images=4), npz, tmp_path / "run")
    with pytest.raises(TrainError, match="omit --resume to start a run there"):
        train(tiny(total_images=4), npz, tmp_path / "run", resume=True)
    train(tiny(total_images=4), npz, tmp_path / "run")


def test_a_run_that_ended_before_writing_its_model_writes_it_on_resume(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = train(tiny(total_images=4), npz, run)
    before = files_in(model)
    shutil.rmtree(model)
    train(tiny(total_images=4), npz, run, resume=True)
    assert files_in(model) == before


def test_a_log_line_on_a_full_disk_does_not_change_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    append_line(log, {"images": 4})
    before = log.read_bytes()
    with longest_file(len(before) + 3), pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
        append_line(log, {"images": 8})
    assert log.read_bytes() == before


def test_errors_of_optional_files_are_warnings(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_without_words(*_: object) -> None:
        raise MemoryError

    def fail(path: Path, _: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(loop, "append_line", fail)
    monkeypatch.setattr("trainer.preview.preview", fail_without_words)
    train(tiny(total_images=4, log_every_batches=1), npz, tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    log = tmp_path / "run" / "metrics.jsonl"
    assert f"warning: no line in the log: {log}: No space left on device" in lines
    assert "warning: no sample grid after 4 images: MemoryError" in lines


def test_the_speed_does_not_count_checkpoints_and_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 9.0, 10.0])
    monkeypatch.setattr("trainer.log.time.perf_counter", lambda: next(now))
    window = Window()
    zeros = torch.zeros(4)
    window.add({"loss": zeros, "mse": zeros}, torch.zeros(4, dtype=torch.int64), torch.tensor(1.0), 10)
    with window.clock_stopped():
        pass
    assert window.summary()["images_per_second"] == 2.0


def test_the_log_has_the_share_of_the_time_that_was_waited_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.5, 2.0, 6.0, 8.0])
    monkeypatch.setattr("trainer.log.time.perf_counter", lambda: next(now))
    window = Window(())
    window.add({"loss": torch.zeros(4)}, torch.zeros(4, dtype=torch.int64), torch.tensor(1.0), 10)
    with window.waiting_for_data():
        pass
    with window.clock_stopped():
        pass
    assert window.summary()["data_wait"] == 0.5 / (8 - 4)


# --- what is decided elsewhere


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["model.num_classes=5"],
            "num_classes is 3 here and cannot be set to 5: the data, which have 3 classes, determine it",
        ),
        (
            ["model.null_class=false"],
            "is true here and cannot be set to false: label_dropout, 0.1, determines it",
        ),
        (
            ["model.learn_sigma=false"],
            "is true here and cannot be set to false: diffusion.variance, learned_range, determines",
        ),
        (
            ["class_conditional=false", "model.num_classes=3"],
            "is null here and cannot be set to 3: class_conditional=false",
        ),
        (
            ["label_dropout=0", "sampling.cfg_scale=2"],
            "is 1.0 here and cannot be set to 2: label_dropout=0 determines it",
        ),
        (["loss=simple"], "loss 'simple' would leave the learned variance untrained"),
    ],
)
def test_derived_fields_are_refused_with_their_source(npz: Path, assignments: list[str], message: str) -> None:
    sets = [part for assignment in assignments for part in ("--set", assignment)]
    code, output = invoke("--data", str(npz), *FLAGS, *sets, "--dry-run")
    assert code == 1
    assert message in output


def test_derived_fields_may_be_set_to_their_value(npz: Path) -> None:
    sets = ["--set", "model.num_classes=3", "--set", "model.null_class=true", "--set", "model.learn_sigma=true"]
    assert invoke("--data", str(npz), *FLAGS, *sets, "--dry-run")[0] == 0


def test_a_run_of_an_earlier_version_keeps_its_log_under_the_new_name(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=8), npz, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    before = log.read_text()
    log.rename(tmp_path / "run" / "log.jsonl")
    train(tiny(total_images=16), npz, tmp_path / "run", resume=True)
    assert log.read_text().startswith(before)
    assert not (tmp_path / "run" / "log.jsonl").exists()
