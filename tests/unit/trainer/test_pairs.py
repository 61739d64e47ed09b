"""Pairs of an image and a conditioning image: what is read, what is refused by name, and models trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import CheckpointConfig
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from formats.checkpoint import load_unet
from tests.unit.trainer.test_trainer import tiny, weights
from trainer import loop
from trainer.batches import Batches, read_pairs
from trainer.config import TrainConfig
from trainer.data import DataConfig, DataError, Dataset, open_dataset, stored_array
from trainer.errors import TrainError
from trainer.loop import resolve
from trainer.run_folder import checkpoints
from trainer.timestep_sampler import StratifiedSampler
from trainer.validation import held_out

RNG = np.random.default_rng(0)
COUNT = 12


def put(path: Path, grey: int = 90, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


def save(path: Path, **arrays: Any) -> Path:
    """Write an npz of COUNT pairs; heights in 0..1000 are the condition, unless another `cond` is given."""
    images = RNG.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    cond = RNG.uniform(0, 1000, (COUNT, 8, 8, 2)).astype(np.float32)
    np.savez(path, **{"images": images, "labels": np.arange(COUNT) % 3, "cond": cond, **arrays})
    return path


def conditioned(**changes: Any) -> TrainConfig:
    model = tiny().model.replace(cond_channels=2).model_dump()
    return tiny(model=model, data={"cond_range": (0, 1000)}, preview_per_class=0).replace(**changes)


def opened(path: Path, config: TrainConfig | None = None, **options: Any) -> Dataset:
    config = config or conditioned()
    return open_dataset(
        path, 8, config.model.image_channels, config.data, cond_channels=config.cond_channels, **options
    )


def folders(tmp_path: Path, images: list[str], conds: list[str], **options: Any) -> Dataset:
    """Open two folders; the grey level of an image is its number in the list of images, in both."""
    for side, names in (("images", images), ("conds", conds)):
        for name in names:
            number = next((k for k, other in enumerate(images) if other.split(".")[0] == name.split(".")[0]), 200)
            put(tmp_path / side / name, number)
    return open_dataset(tmp_path / "images", 8, 1, cond_channels=1, cond=tmp_path / "conds", **options)


def test_files_of_two_folders_are_paired_by_name(tmp_path: Path) -> None:
    images = ["10/b.png", "2/a.png", "2/b.png", "10/deep/c.png"]
    conds = ["2/b.tif", "2/a.png", "10/deep/c.bmp", "10/b.png"]
    data = folders(tmp_path, images, conds)
    assert data.class_names == ("2", "10")  # in another order than the conditioning images are listed
    assert data.conditions is not None
    pixels = data.images(np.arange(4))
    assert np.array_equal(pixels, data.conditions.images(np.arange(4)))
    assert sorted(pixels[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]
    first, second = data.summary.splitlines()
    assert first.startswith("data: 4 images 8x8; 2 classes: 2 (2), 10 (2)")
    assert second == "conditioning images: 4 images 8x8"
    assert {"folder", "content_sha256", "cond_folder", "cond_content_sha256"} <= data.description.keys()


def test_the_sides_may_have_other_channels(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", 7)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(put(tmp_path / "conds" / "a.png"))
    data = open_dataset(tmp_path / "images", 8, 1, labelled=False, cond_channels=3, cond=tmp_path / "conds")
    x0, cond = read_pairs(data, np.array([0]))
    assert cond is not None
    assert (x0.shape, cond.shape) == ((1, 1, 8, 8), (1, 3, 8, 8))
    assert torch.allclose(cond[0, :, 0, 0], torch.tensor([1.0, 2.0, 3.0]) / 127.5 - 1)


@pytest.mark.parametrize(
    ("images", "conds", "message"),
    [
        (["c/a.png", "c/b.png"], ["c/a.png"], r"1 images have no conditioning image in .*conds: c/b\.png"),
        (["c/a.png"], ["c/a.png", "c/x.png", "y.png"], r"2 conditioning images have no image in .*: c/x\.png, y\.png"),
        (
            ["c/a.png"],
            ["d/a.png"],
            r"no conditioning image in .*: c/a\.png; 1 conditioning images have no .*: d/a\.png",
        ),
        (["c/a.png", "c/a.bmp"], ["c/a.png"], r"c/a\.bmp and c/a\.png have the same name but for their suffix"),
    ],
)
def test_missing_and_surplus_names_are_refused(
    tmp_path: Path, images: list[str], conds: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        folders(tmp_path, images, conds)


def test_pairs_of_two_sizes_are_refused_by_name(tmp_path: Path) -> None:
    folders(tmp_path, ["c/a.png", "c/b.png"], ["c/a.png", "c/b.png"])
    put(tmp_path / "conds" / "c" / "b.png", size=(6, 8))
    with pytest.raises(DataError, match=r"1 of 2 pairs do not: c/b\.png is 8x8, its conditioning image 6x8"):
        folders(tmp_path, [], [])
    with pytest.raises(DataError, match="an image and its conditioning image must have the same size; 12 of 12"):
        opened(save(tmp_path / "a.npz", cond=np.zeros((COUNT, 8, 6, 2))))


def test_a_photograph_that_is_rotated_by_its_exif_block_has_the_size_it_is_shown_in(tmp_path: Path) -> None:
    path = put(tmp_path / "images" / "c" / "a.jpg", size=(12, 8))
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, exif=exif)
    put(tmp_path / "conds" / "c" / "a.png", size=(8, 12))
    assert "conditioning images: 1 image 8x12" in folders(tmp_path, [], []).summary


def test_what_is_no_pair_is_refused_with_what_is_wanted(tmp_path: Path) -> None:
    npz = save(tmp_path / "a.npz")
    folder = put(tmp_path / "images" / "c" / "a.png").parents[1]
    np.save(tmp_path / "images.npy", np.zeros((COUNT, 8, 8), np.uint8))
    np.save(tmp_path / "cond.npy", np.zeros((COUNT - 1, 8, 8, 2)))
    np.savez(tmp_path / "plain.npz", images=np.zeros((2, 8, 8), np.uint8), labels=[0, 0])
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "plain.npz", {}, "must contain the arrays 'cond'; .*may also be a file of their own: --cond"),
        (npz, {"cond": tmp_path / "cond.npy"}, "as many conditioning images as images, 12; got 11"),
        (npz, {"cond": folder}, "must be an npz or npy file"),
        (npz, {"cond_channels": 3}, "the array 'cond' has 2 channels, model.cond_channels is 3"),
        (npz, {"options": None}, r"cond must be uint8 .*--set data\.cond_range=.*\(\(cond - cond\.min"),
        (npz, {"options": DataConfig(cond_range=(0, 10))}, r"values outside data\.cond_range 0\.\.10"),
        (tmp_path / "images.npy", {"labelled": False}, "is one array; .*: --cond FILE"),
        (folder, {}, "must be a folder .*, because model.cond_channels is 2"),
        (folder, {"cond": npz}, "must be a folder .*; .*a.npz is none"),
        (folder, {"cond": folder}, r"image files can be read as 1 .*; model\.cond_channels is 2"),
        (npz, {"cond_channels": 0, "cond": npz}, "set model.cond_channels to their channels"),
    ]
    for path, changes, message in cases:
        arguments: dict[str, Any] = {"cond_channels": 2, "options": DataConfig(cond_range=(0, 1000))} | changes
        with pytest.raises(DataError, match=message):
            open_dataset(path, 8, 1, arguments.pop("options"), **arguments)
    unused = open_dataset(npz, 8, 1)
    assert "its array 'cond' is not used (model.cond_channels)" in unused.summary
    with pytest.raises(ValueError, match=r"model\.cond_channels is 2, and these data are images without"):
        resolve(conditioned(), unused)


def test_the_configuration_must_fit_the_conditioning_channels() -> None:
    with pytest.raises(ValueError, match=r"data\.cond_range needs model\.cond_channels"):
        tiny(data={"cond_range": (0, 1)})
    with pytest.raises(ValueError, match=r"data\.cond_range must .* one such pair per channel \(2\); got 3 pairs"):
        conditioned(data={"cond_range": ((0, 1),) * 3})
    with pytest.raises(ValueError, match=r"data\.value_range must .* one such pair per channel \(1\); got 2 pairs"):
        tiny(data={"value_range": ((0, 1),) * 2})


@pytest.mark.parametrize("in_memory", [True, False])
def test_flips_and_crops_are_those_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    if not in_memory:
        monkeypatch.setattr(stored_array, "IN_MEMORY_BYTES", 0)
    images = RNG.integers(0, 256, (COUNT, 11, 9, 1), dtype=np.uint8)
    path = save(tmp_path / "a.npz", images=images, cond=np.concatenate([images, 255 - images], axis=-1))
    config = conditioned(data={"random_crop": True}, horizontal_flip=True, batch_size=COUNT)
    dataset = opened(path, config)

    def drawn(config: TrainConfig, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        batch = Batches(resolve(config, dataset), dataset, StratifiedSampler(9), rank=rank, world=world).draw(24)
        return batch.x0, batch.conditions["cond"]

    x0, cond = drawn(config)
    assert torch.equal(cond[:, :1], x0)
    assert torch.allclose(cond[:, 1:], -x0, atol=0.02)  # but for the rounding of the scaled pixels
    plain, _ = drawn(config.replace(horizontal_flip=False, data={}))
    assert not torch.allclose(plain, x0)
    for rank in range(3):
        part = drawn(config, rank, 3)
        assert torch.equal(part[0], x0[rank::3])
        assert torch.equal(part[1], cond[rank::3])


def test_held_out_images_keep_their_conditions(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    config = conditioned(validation_share=0.25, data={}, model=tiny().model.replace(cond_channels=1).model_dump())
    training, held = held_out(config, opened(save(tmp_path / "a.npz", images=images, cond=images), config))
    assert held is not None
    for part, count in ((training, 9), (held, 3)):
        x0, cond = read_pairs(part, np.arange(count))
        assert cond is not None
        assert torch.equal(x0, cond)


def train(config: TrainConfig, data: Path, run: Path, **options: Any) -> Path:
    dataset = opened(data, config)
    return loop.train(resolve(config, dataset), dataset, run, **options)


def test_a_resumed_run_equals_an_uninterrupted_one_and_notices_other_conditions(tmp_path: Path) -> None:
    data, config = save(tmp_path / "a.npz"), conditioned(validation_share=0.1, validation_every_images=20)
    train(config, data, tmp_path / "whole")
    train(config.replace(total_images=20), data, tmp_path / "parts")
    with pytest.raises(TrainError, match=r"was trained on other data: .*cond_sha256"):
        train(config, save(tmp_path / "b.npz"), tmp_path / "parts", resume=True)
    train(config, data, tmp_path / "parts", resume=True)
    whole, parts = (weights(checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    lines = [(tmp_path / name / "validation.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_a_model_that_was_trained_on_pairs_is_sampled_by_the_service(tmp_path: Path) -> None:
    data = save(tmp_path / "a.npz")
    sets = {"model.channel_mult": "[1]", "model.attention_resolutions": "[]", "model.image_size": "8",
            "model.cond_channels": "2", "data.cond_range": "0,1000", "total_images": "16", "batch_size": "8",
            "preview_per_class": "0", "precision": "float32", "diffusion.num_timesteps": "50"}  # fmt: skip
    options = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    cond = np.load(data)["cond"][:1]
    np.save(tmp_path / "cond.npy", cond)
    out = tmp_path / "sample.npy"
    runner = CliRunner()
    trained = runner.invoke(app, ["train", "fashion32", "--data", str(data), "--out", str(tmp_path / "run"), *options])
    assert trained.exit_code == 0, trained.output
    assert "conditioning images: 12 images 8x8; float32 values in" in trained.output
    model = tmp_path / "run" / "model"
    config, network = load_unet(model)
    assert isinstance(config, CheckpointConfig)
    assert (config.cond_range, config.value_range) == ((0, 1000), (0, 255))
    assert config.provenance["command"].startswith("iddpm train fashion32 --data a.npz --set")
    fields = ["--class", "1", "--seed", "3", "--steps", "4", "--cfg-scale", "1.5"]
    places = ["--model", str(model), "--cond", str(tmp_path / "cond.npy"), "--out", str(out)]
    sampled = runner.invoke(app, ["sample", *places, *fields])
    assert sampled.exit_code == 0, sampled.output
    scaled = (cond.astype(np.float64) / 1000 * 2 - 1).astype(np.float32).transpose(0, 3, 1, 2)[0]
    spec = ImageSpec(seed=3, class_index=1, cfg_scale=1.5, cond=scaled)
    expected = sample_images(network, build_plan(config.diffusion, "ancestral", "4"), [spec])
    np.testing.assert_allclose(np.load(out).reshape(8, 8), expected.reshape(8, 8), atol=1)


def test_the_command_names_the_conditions_of_two_folders(tmp_path: Path) -> None:
    folders(tmp_path, ["c/a.png", "d/b.png"], ["c/a.png", "d/b.png"])
    command = ["train", "fashion32", "--data", str(tmp_path / "images"), "--set", "model.cond_channels=1", "--dry-run"]
    shown = CliRunner().invoke(app, [*command, "--cond", str(tmp_path / "conds")])
    assert shown.exit_code == 0, shown.output
    assert "conditioning images: 2 images 8x8" in shown.output
    assert (
        json.loads(shown.output[shown.output.index("{") : shown.output.rindex("}") + 1])["model"]["cond_channels"] == 1
    )
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code != 0
    assert "must be a folder (--cond)" in " ".join(refused.output.split())


def pieces(path: Path, columns: int) -> np.ndarray[Any, Any]:
    """Return the tiles of a preview of 8x8 images without captions, [rows, columns, 8, 8]."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    left = pixels.shape[1] - (columns // 3) * 26 + 2  # triples of 24 pixels with gaps of 2 between them
    rows = pixels.shape[0] // 10
    return np.stack(
        [
            [pixels[10 * r : 10 * r + 8, left + 26 * (c // 3) + 8 * (c % 3) :][:, :8] for c in range(columns)]
            for r in range(rows)
        ]
    )


@pytest.mark.parametrize("held", [False, True])
def test_previews_show_condition_sample_and_original(tmp_path: Path, held: bool) -> None:
    """Image k is white in column k, its condition in row k; the class of k is k % 2."""
    images = 255 * np.broadcast_to(np.eye(8, dtype=np.uint8)[:, None, :, None], (8, 8, 8, 1))
    data = save(tmp_path / "a.npz", images=images, cond=images.transpose(0, 2, 1, 3), labels=np.arange(8) % 2)
    config = conditioned(
        model=tiny().model.replace(cond_channels=1).model_dump(), data={}, preview_per_class=2, total_images=4,
        validation_share=0.5 if held else 0,
    )  # fmt: skip
    train(config, data, tmp_path / "run")
    shown = np.arange(8)
    if held:
        part = held_out(config, opened(data, config))[1]
        assert part is not None
        shown = part.images(np.arange(4))[:, 0, :, 0].argmax(axis=1)
    tiles = pieces(tmp_path / "run" / "samples" / "000000000004.png", 6)
    assert len(tiles) == 2
    for label, (cond, sample, original, *others) in enumerate(tiles):
        expected = [k for k in shown if k % 2 == label][:2]
        assert [cond.argmax() // 8, others[0].argmax() // 8] == expected
        assert [original.argmax() % 8, others[2].argmax() % 8] == expected
        assert np.array_equal(cond, original.T)
        assert not np.array_equal(sample, others[1])


def test_previews_of_an_upsampler_show_the_enlarged_image(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 1), np.uint8)
    images[0, :4], images[1, :, :4] = 255, 255
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 0])
    config = tiny(total_images=4, preview_per_class=2, model=tiny().model.replace(low_res_size=2).model_dump())
    train(config, tmp_path / "a.npz", tmp_path / "run")
    ((small, sample, original, other, *_),) = pieces(tmp_path / "run" / "samples" / "000000000004.png", 6)
    assert np.array_equal(original, images[0, ..., 0])
    assert (small[0] == 255).all()
    assert (small[-1] == 0).all()
    assert 0 < small[4, 0] < 128  # between the two pixels of the small picture
    assert (other[:, 0] == 255).all()
    assert not np.array_equal(sample, original)
