"""Training is repeatable and resumable bit for bit, and unsupported options have clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from cli.train_command import parse_assignments
from diffusion.config import CheckpointConfig, ModelConfig
from formats.checkpoint import load_unet
from formats.checkpoint_config import read_config
from trainer import loop
from trainer.config import TrainConfig
from trainer.data import DataError, batch_indices, open_dataset
from trainer.loop import resolve
from trainer.optimisation import learning_rate
from trainer.run_folder import checkpoints

IMAGES = 24


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "toy.npz"
    labels = rng.integers(0, 3, IMAGES)
    images = rng.integers(0, 256, (IMAGES, 6, 6, 1), dtype=np.uint8)
    np.savez(path, images=images, labels=labels, classes=np.array(["x", "y", "z"]))
    return path


def tiny(**changes: object) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            image_size=8, image_channels=1, model_channels=32, channel_mult=(1,), num_res_blocks=1,
            attention_resolutions=(), num_heads=1, dropout=0.1,
        ),
        total_images=40,
        batch_size=4,
        lr=1e-3,
        precision="float32",
        timestep_sampler="loss_second_moment",
        horizontal_flip=True,
        preview_per_class=1,
        preview_steps=2,
        checkpoint_every_images=20,
        log_every_batches=2,
    ).replace(**changes)  # fmt: skip


def train(config: TrainConfig, data: Path, run: Path, *, resume: bool = False, command: str = "") -> Path:
    dataset = open_dataset(data, config.model.image_size, config.model.image_channels)
    return loop.train(resolve(config, dataset), dataset, run, resume=resume, command=command)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "state" / "train_state.safetensors")}


@pytest.mark.parametrize("changes", [{}, {"channels_last": True}, {"precision": "bfloat16", "grad_clip": 1.0}])
def test_ten_steps_equal_five_and_a_resume_and_five(npz: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    config = tiny(**changes)
    train(config, npz, tmp_path / "whole")
    train(config.replace(total_images=20), npz, tmp_path / "halves")
    train(config, npz, tmp_path / "halves", resume=True)
    whole, halves = (weights(checkpoints(tmp_path / name)[-1]) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name


def test_further_averages_resume_bit_for_bit_and_leave_a_snapshot_per_checkpoint(npz: Path, tmp_path: Path) -> None:
    config = tiny(ema_sigma_rels=(0.05, 0.1), ema_decay=(0.999, 0.9))
    train(config, npz, tmp_path / "whole")
    train(config.replace(total_images=20), npz, tmp_path / "halves")
    notes = tmp_path / "halves" / "ema" / "mine.safetensors"  # a user's own file, not part of the run
    notes.write_bytes(b"")
    train(config, npz, tmp_path / "halves", resume=True)
    notes.unlink()
    snapshots = [sorted((tmp_path / name / "ema").iterdir()) for name in ("whole", "halves")]
    assert [path.name for path in snapshots[0]] == ["000000000020.safetensors", "000000000040.safetensors"]
    for whole, halves in zip(*snapshots, strict=True):
        assert whole.read_bytes() == halves.read_bytes()
    keys = {name.split("/")[0] for name in load_file(snapshots[0][0])}
    assert keys == {"0.05", "0.1", "decay_0.999", "decay_0.9"}


def test_decays_are_listed_once_and_a_number_is_a_list_of_one() -> None:
    assert tiny(ema_decay=0.5).ema_decay == (0.5,)  # recorded in checkpoints of earlier versions
    assert tiny().with_overrides(parse_assignments(["ema_decay=0.9999,0.999"])).ema_decay == (0.9999, 0.999)
    for wrong, message in (
        ([], "at least 1 item"),
        ([0.5, 1.0], "less than 1"),
        ([0.5, 0.5], r"must list each decay once; got 0\.5, 0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(ema_decay=wrong)


def test_a_run_writes_a_model_a_log_previews_and_its_configuration(npz: Path, tmp_path: Path) -> None:
    model = train(tiny(), npz, tmp_path / "run", command="iddpm train toy")
    config, _ = load_unet(model)
    assert config.class_names == ("x", "y", "z")
    assert (config.model.num_classes, config.model.null_class) == (3, True)
    assert config.provenance["images_seen"] == 40
    assert config.provenance["command"] == "iddpm train toy"
    assert config.provenance["data"]["file"] == "toy.npz"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8, 16, 24, 32, 40]
    assert {"loss", "mse", "vb_bpd", "grad_norm", "lr", "images_per_second"} <= lines[0].keys()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    saved = TrainConfig.model_validate_json((tmp_path / "run" / "train_config.json").read_text())
    assert saved == resolve(tiny(), open_dataset(npz, 8, 1))
    assert not (model / "state").exists()


def test_microbatches_average_to_the_complete_batch(npz: Path, tmp_path: Path) -> None:
    config = tiny(total_images=4, log_every_batches=1, model=tiny().model.replace(dropout=0.0).model_dump())
    logs = []
    for name, size in (("whole", None), ("parts", 2)):
        train(config.replace(microbatch_size=size), npz, tmp_path / name)
        logs.append(json.loads((tmp_path / name / "metrics.jsonl").read_text()))
    for term in ("loss", "mse", "vb_bpd", "grad_norm"):
        assert logs[0][term] == pytest.approx(logs[1][term], rel=1e-3), term


def test_an_unconditional_run_ignores_labels(npz: Path, tmp_path: Path) -> None:
    config = read_config(train(tiny(total_images=4, class_conditional=False), npz, tmp_path / "run"))
    assert isinstance(config, CheckpointConfig)
    assert (config.model.num_classes, config.class_names, config.sampling.cfg_scale) == (None, None, 1.0)


def test_ranges_of_channels_are_recorded_in_the_model(tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros((4, 8, 8, 2), np.float32), labels=np.zeros(4, np.int64))
    (ranges,) = parse_assignments(["data.value_range=[[0,1],[-40,60]]"]).values()
    model = tiny().model.replace(image_channels=2).model_dump()
    config = tiny(total_images=4, model=model, preview_per_class=0).with_overrides({"data.value_range": ranges})
    dataset = open_dataset(data, 8, 2, config.data)
    trained = read_config(loop.train(resolve(config, dataset), dataset, tmp_path / "run"))
    assert isinstance(trained, CheckpointConfig)
    assert trained.channel_ranges == ((0, 1), (-40, 60))


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_images_of_other_channels_are_previewed_side_by_side(tmp_path: Path, channels: int) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros((4, 8, 8, channels), np.uint8), labels=np.zeros(4, np.int64))
    model = tiny().model.replace(image_channels=channels).model_dump()
    train(tiny(total_images=4, model=model), data, tmp_path / "run")
    with Image.open(tmp_path / "run" / "samples" / "000000000004.png") as picture:
        assert picture.width > 8 * channels


def test_previews_can_be_turned_off(npz: Path, tmp_path: Path) -> None:
    train(tiny(total_images=4, preview_per_class=0), npz, tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()


def test_order_is_a_permutation_per_epoch_and_independent_of_the_batch_size() -> None:
    order = batch_indices(seed=3, images_seen=0, batch_size=2 * IMAGES, num_images=IMAGES)
    assert sorted(order[:IMAGES]) == sorted(order[IMAGES:]) == list(range(IMAGES))
    assert order[:IMAGES].tolist() != order[IMAGES:].tolist()
    parts = [batch_indices(3, start, 5, IMAGES) for start in range(0, 45, 5)]
    assert np.concatenate(parts).tolist() == order[:45].tolist()


def test_a_folder_of_class_folders_is_read_scaled_and_cropped(tmp_path: Path) -> None:
    for name, grey, size in (("b", 200, (40, 20)), ("a", 50, (16, 16))):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", size, (grey, grey, grey)).save(tmp_path / "data" / name / "one.png")
    dataset = open_dataset(tmp_path / "data", 8, 3)
    assert dataset.class_names == ("a", "b")
    assert dataset.labels.tolist() == [0, 1]
    images = dataset.images(np.array([1, 0]))
    assert images.shape == (2, 8, 8, 3)
    assert [int(image.mean()) for image in images] == [200, 50]


def test_data_that_cannot_be_trained_on_is_refused_by_name(npz: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"toy\.npz: the array 'images' has 1 channels, model\.image_channels is 3"):
        open_dataset(npz, 8, 3)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nowhere", 8, 1)
    damaged = bytearray(npz.read_bytes())
    damaged[300] ^= 1
    for name, content, reason in (
        ("junk", b"junk", "holds only a short text"),
        ("empty", b"", "is empty"),
        ("cut", damaged[:300], "is truncated"),
        ("damaged", damaged, "cannot be read as an npz file: Bad CRC-32"),
    ):
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_dataset(tmp_path / f"{name}.npz", 8, 1)
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], dtype=object), labels=np.array([0]))
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(tmp_path / "pickled.npz", 8, 1)
    (tmp_path / "classes" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="contains no image"):
        open_dataset(tmp_path / "classes", 8, 1)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = tiny(total_images=1000, batch_size=10, lr=1.0, lr_warmup_images=100, lr_schedule="cosine")
    rates = [learning_rate(config, images) for images in (0, 50, 90, 100, 550, 990)]
    assert rates[:4] == pytest.approx([0.1, 0.6, 1.0, 1.0])
    assert rates[4] == pytest.approx(0.5)
    assert rates[5] < 1e-3


def test_a_linear_rate_falls_to_zero_and_an_inverse_root_never_does() -> None:
    linear = tiny(total_images=1000, batch_size=10, lr=1.0, lr_warmup_images=100, lr_schedule="linear")
    assert [learning_rate(linear, images) for images in (100, 550, 1000)] == pytest.approx([1.0, 0.5, 0.0])
    root = linear.replace(lr_schedule="inverse_sqrt", lr_decay_images=200)
    assert [learning_rate(root, images) for images in (0, 200, 800, 20_000)] == pytest.approx([0.1, 1.0, 0.5, 0.1])


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, " ".join(result.output.split())


def test_errors_of_the_command_line_list_the_allowed_values(npz: Path) -> None:
    code, output = run_cli("train", "fashion99", "--data", str(npz))
    assert (code, "allowed: cifar10, " in output, " fashion32, " in output) == (1, True, True)
    code, output = run_cli("train", "fashion32", "--data", str(npz), "--set", "model.dropuot=0.1")
    assert (code, "unknown field 'model.dropuot'; allowed here:" in output) == (1, True)
    code, output = run_cli("train", "fashion32", "--data", str(npz), "--set", "lr")
    assert (code, "--set takes name=value" in output) == (1, True)
    code, output = run_cli("train", "fashion32", "--data", str(npz), "--set", "diffusion.variance=fixed_small")
    assert (code, "loss 'hybrid' needs a learned variance" in output) == (1, True)
    code, output = run_cli("train", "fashion32", "--data", str(npz), "--set", "loss=l2")
    assert (code, "'simple', 'hybrid' or 'vlb'" in output) == (1, True)


def test_lists_may_be_given_without_brackets(npz: Path) -> None:
    assert parse_assignments(["a=1,2,3", "b=[1,2]", "c=0.5, 1", "d=rgb(1,2,3)", "e=x,y", "f=7", "g=null"]) == {
        "a": [1, 2, 3], "b": [1, 2], "c": [0.5, 1], "d": "rgb(1,2,3)", "e": "x,y", "f": 7, "g": None,
    }  # fmt: skip
    settings = ["model.channel_mult=1,2,3", "model.attention_resolutions=16", "data.value_range=0,4095"]
    code, output = run_cli(
        "train", "fashion32", "--data", str(npz), "--dry-run", *(part for s in settings for part in ("--set", s))
    )
    assert code == 0, output
    assert '"channel_mult": [ 1.0, 2.0, 3.0 ]' in output
    assert '"attention_resolutions": [ 16 ]' in output


def test_a_dry_run_summarises_the_data(npz: Path, tmp_path: Path) -> None:
    code, output = run_cli("train", "fashion32", "--data", str(npz), "--dry-run")
    counts = dict(zip(*np.unique(np.load(npz)["labels"], return_counts=True), strict=True))
    classes = ", ".join(f"{name} ({counts[index]})" for index, name in enumerate("xyz"))
    assert (
        code,
        f"data: 24 images 6x6; 3 classes: {classes}; 24 smaller than the model's 32x32, framed" in output,
    ) == (
        0,
        True,
    )
    (tmp_path / "flat").mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "flat" / "0.png")
    code, output = run_cli("train", "fashion32", "--data", str(tmp_path / "flat"), "--dry-run")
    assert (code, "--set class_conditional=false" in output) == (1, True)
    command = ("train", "fashion32", "--data", str(tmp_path / "flat"), "--set", "class_conditional=false", "--dry-run")
    code, output = run_cli(*command, "--decode-all")
    assert (code, "data: 1 image 40x40; no classes; 1 scaled and cropped to 32x32" in output) == (0, True)


def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(npz: Path, tmp_path: Path) -> None:
    code, output = run_cli("train", "fashion32", "--data", str(npz), "--out", str(tmp_path / "run"), "--dry-run")
    assert code == 0
    assert '"num_classes": 3' in output
    assert not (tmp_path / "run").exists()
