"""Weights as users have them: with names of wrappers, other channels, or another file in their place."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import CheckpointConfig
from formats.checkpoint import expected_shapes, load_unet, read_weights
from formats.checkpoint_config import CheckpointError, read_config
from formats.file_content import describe_wrong_content
from interchange.import_diffusers import open_folder
from interchange.import_openai import load_state_dict
from interchange.openai_flags import config_from_flags, parse_flag_line
from interchange.openai_shapes import channels_to_infer, describe_mismatch
from interchange.published import PUBLISHED
from interchange.sanity_words import words_for
from interchange.wrapped_names import without_wrappers
from model_export.diffusers_export import export_diffusers
from tests import golden
from tests.fakes import tiny_checkpoint
from tests.paths import BUNDLED
from tests.unit.formats.test_atomic_file import longest_file

WEIGHTS = BUNDLED / "model.safetensors"
SMALL = "--image_size 16 --channel_mult 1 --num_channels 32 --num_res_blocks 1 --attention_resolutions 16 --num_heads 2"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f3e\nsize 12345\n"


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def small(repo: str = "improved", **flags: str) -> CheckpointConfig:
    assert repo in ("improved", "guided")
    config = config_from_flags(repo, {**parse_flag_line(SMALL), **flags})  # type: ignore[arg-type]  # checked above
    assert isinstance(config, CheckpointConfig)
    return config


# --- other files in place of weights


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "is a Git LFS pointer: run git lfs pull"),
        (b"\xef\xbb\xbf\n  <!DOCTYPE html><html>", "is a web page (HTML or XML)"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page (HTML or XML)"),
        (b"", "is empty"),
        (b"Entry not found", "holds only a short text: 'Entry not found'"),
        (b'{"error": "gated"}', """holds only a short text: '{"error": "gated"}'"""),
        (gzip.compress(b"weights", mtime=0), "is packed (gzip): unpack it first"),
        (zipped(weights=b"1")[:-10], "is truncated: its end is missing"),
        (zipped(weights=b"1", readme=b"2"), "is a zip archive of 2 files (weights, readme, ...): unpack it first"),
        (WEIGHTS.read_bytes()[:5000], "is truncated or damaged: it has 5000 bytes instead of"),
        (WEIGHTS.read_bytes()[:-1], "is truncated or damaged: it has"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # not the bytes, some of which contain the time
)
def test_the_error_for_another_file_in_place_of_weights_describes_it(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    assert str(caught.value).startswith(f"{path} {words}")


def test_weights_are_not_mistaken_for_other_files() -> None:
    assert describe_wrong_content(WEIGHTS) is None
    assert describe_wrong_content(golden.GOLDEN_DIR / "imp_superres.pt") is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_the_error_for_a_checkpoint_cloned_without_large_files_has_the_reason(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    (folder / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
        load_unet(folder)


def test_a_safetensors_file_with_openai_s_names_is_read() -> None:
    assert load_state_dict(WEIGHTS).keys() == load_file(WEIGHTS).keys()


@pytest.mark.parametrize("flags", [(), ("--scheduler", "x"), ("--preset", "adm-lsun-cat")])
def test_a_missing_file_is_reported_first(tmp_path: Path, flags: tuple[str, ...]) -> None:
    code, output = invoke(tmp_path / "nowhere.pt", "--out", tmp_path / "out", *flags)
    assert (code, output) == (1, f"error: {tmp_path / 'nowhere.pt'} does not exist")


def test_the_error_for_a_file_of_a_diffusers_folder_names_the_folder(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    code, output = invoke(folder / "model.safetensors", "--out", tmp_path / "out")
    assert (code, f"import the folder, {folder}" in output) == (1, True)


# --- names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "ema.model."])
def test_prefixes_of_wrappers_are_removed(prefix: str) -> None:
    plain = {name: torch.zeros(1) for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.bias")}
    weights, taken = without_wrappers({prefix + name: tensor for name, tensor in plain.items()}, "time_embed.0.weight")
    assert weights.keys() == plain.keys()
    assert "".join(taken) == prefix
    assert without_wrappers(plain, "time_embed.0.weight") == (plain, [])


def test_names_of_wrappers_inside_names_are_removed_and_clashes_refused() -> None:
    inside = {"time_embed.0.weight": torch.zeros(1), "input_blocks.1._orig_mod.0.weight": torch.zeros(1)}
    assert list(without_wrappers(inside, "time_embed.0.weight")[0]) == [
        "time_embed.0.weight",
        "input_blocks.1.0.weight",
    ]
    with pytest.raises(CheckpointError, match="two weights are called a"):
        without_wrappers({"a": torch.zeros(1), "module.a": torch.zeros(1)}, "time_embed.0.weight")


def test_a_prefix_of_only_some_names_is_kept() -> None:
    mixed = {"ema.time_embed.0.weight": torch.zeros(1), "raw.time_embed.0.weight": torch.zeros(1)}
    assert without_wrappers(mixed, "time_embed.0.weight") == (mixed, [])


def test_a_compiled_grey_model_is_imported_without_flags_for_channels(tmp_path: Path) -> None:
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in load_file(WEIGHTS).items()}
    torch.save(weights, tmp_path / "grey.pt")
    flags = (
        "--image_size 32 --num_channels 32 --channel_mult 1,2,3 --num_res_blocks 1 --attention_resolutions 8 "
        "--num_heads 4 --class_cond True --num_classes 11 --learn_sigma True --diffusion_steps 4000 "
        "--noise_schedule cosine --rescale_timesteps True"
    )
    # OpenAI's flags cannot express the 8 norm groups of the bundled model, so its weights fail the check here
    options = ("--out", tmp_path / "out", "--repo", "improved", "--flags", flags, "--allow-failed-sanity-check")
    code, output = invoke(tmp_path / "grey.pt", *options)
    assert code == 0, output
    for note in ("'module.' was removed from the names of weights", "image_channels: 1, read from the weights"):
        assert f"note: {note}" in output
        assert note in read_config(tmp_path / "out").provenance["notes"]
    expected = load_file(WEIGHTS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_weights(tmp_path / "out").items())


# --- channels


@pytest.mark.parametrize(
    "flags",
    [
        {"image_channels": "2"},
        {"in_channels": "2"},
        {"out_channels": "4", "learn_sigma": "True"},
        {"in_channels": "2", "out_channels": "2"},
        {"large_size": "16", "small_size": "8", "in_channels": "2"},
    ],
)
def test_channels_may_be_given_by_several_flags(flags: dict[str, str]) -> None:
    given = parse_flag_line(SMALL) | flags
    if "large_size" in flags:
        del given["image_size"]
    assert config_from_flags("improved", given).model.image_channels == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_channels": "1", "in_channels": "4"}, "must agree .*image_channels means 1, in_channels means 4"),
        ({"in_channels": "1", "out_channels": "3"}, "in_channels means 1, out_channels means 3"),
        ({"out_channels": "3", "learn_sigma": "True"}, "out_channels must be even with learn_sigma True; got 3"),
        ({"image_channels": "0"}, "flag image_channels must be a positive integer"),
    ],
)
def test_channels_that_contradict_each_other_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**flags)


@pytest.mark.parametrize(
    ("file", "config", "inferred"),
    [
        (small(image_channels="1"), small(), 1),
        (small(image_channels="5", learn_sigma="True"), small(learn_sigma="True"), 5),
        (small(image_channels="5", learn_sigma="True"), small(), 5),  # learn_sigma is wrong, and the error will name it
        (small(), small(), None),
        (small(image_channels="1"), small(image_channels="4"), None),  # given, and wrong
        (small(image_channels="6"), small(), None),  # may be an image of 3 channels and a low-resolution one
        (small(image_channels="1"), PUBLISHED["cifar10-uncond-50m"].config, None),
    ],
)
def test_channels_are_read_from_the_weights_if_no_flag_gives_them(
    file: CheckpointConfig, config: CheckpointConfig, inferred: int | None
) -> None:
    assert channels_to_infer(config, expected_shapes(file)) == inferred


def test_wrong_channels_are_reported_on_one_line() -> None:
    lines = describe_mismatch(small(image_channels="3"), expected_shapes(small(image_channels="1")))
    assert lines == ["image_channels: the file has 1 input channels, the configuration says 3 input channels"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conv_in.weight", "its names are those of diffusers; import the folder"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a latent diffusion model"),
        ("model.init_conv.weight", "denoising-diffusion-pytorch"),
    ],
)
def test_networks_of_others_are_recognised(name: str, words: str) -> None:
    (line,) = describe_mismatch(small(), {name: (1, 1, 1, 1)})
    assert words in line


# --- diffusers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder with network and scheduler in subfolders."""
    root = tmp_path_factory.mktemp("diffusers")
    flat, out = root / "flat", root / "out"
    export_diffusers(tiny_checkpoint(root / "tiny"), flat)
    for folder in ("unet", "unet_ema", "scheduler"):
        (out / folder).mkdir(parents=True)
    shutil.copy(flat / "scheduler_config.json", out / "scheduler")
    for folder in ("unet", "unet_ema"):
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            shutil.copy(flat / name, out / folder)
    return out


def test_averaged_weights_are_preferred_and_the_others_can_be_selected(exported: Path) -> None:
    folder = open_folder(exported)
    assert folder.weights.parent.name == "unet_ema"
    assert folder.notes == ("using unet_ema, the averaged weights; --unet unet selects the others",)
    assert open_folder(exported, network="unet").weights.parent.name == "unet"
    with pytest.raises(
        CheckpointError, match=r"ema has no config\.json of a network; the folder has unet_ema and unet"
    ):
        open_folder(exported, network="ema")


def test_the_choice_is_reported_and_the_advice_is_about_the_folder(exported: Path, tmp_path: Path) -> None:
    weights = exported / "unet_ema" / "diffusion_pytorch_model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    code, output = invoke(exported, "--out", tmp_path / "out")
    assert code == 1  # its weights are random
    assert "note: using unet_ema, the averaged weights; --unet unet selects the others" in output
    assert "note: '_orig_mod.' was removed from the names of weights" in output
    assert "attention_head_dim in config.json; num_train_timesteps, beta_schedule and prediction_type in" in output
    assert "--scheduler sets another scheduler_config.json" in output
    assert not {"num_heads", "predict_xstart", "use_new_attention_order"} & set(output.replace(",", " ").split())


def test_advice_depends_on_the_source_of_the_weights() -> None:
    config = small()
    assert words_for(config).describe({"num_timesteps": 4000, "noise_schedule": "linear"}, config.model) == (
        "diffusion_steps=4000, noise_schedule=linear"
    )
    published = PUBLISHED["cifar10-uncond-50m"].config
    assert isinstance(published, CheckpointConfig)
    preset = words_for(published)
    assert preset.cure.startswith(
        "The flags are those of the preset cifar10-uncond-50m, so the file is probably not the published"
    )
    theirs = words_for(config.replace(provenance={"source": "diffusers"}))
    assert theirs.describe({"num_timesteps": 4000, "noise_schedule": "cosine"}, config.model) == (
        "num_train_timesteps=4000, beta_schedule=squaredcos_cap_v2"
    )
    heads = {"num_heads": 2, "num_head_channels": None, "num_heads_upsample": None}
    assert theirs.describe(heads, config.model) == "attention_head_dim=16 (2 heads)"


def test_an_import_to_a_full_disk_ends_with_one_line_and_leaves_nothing(exported: Path, tmp_path: Path) -> None:
    with longest_file(10_000):
        code, output = invoke(exported, "--unet", "unet", "--out", tmp_path / "out", "--allow-failed-sanity-check")
    assert code == 1
    assert output.endswith(f"error: [Errno 27] File too large: '{tmp_path / 'out'}'")
    assert list(tmp_path.iterdir()) == []


def test_weights_whose_checksum_is_wrong_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ema.pt"
    torch.save({"weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1  # one bit of a number; torch.load does not notice
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema\.pt is damaged: the checksum of ema/data/0 is wrong"):
        load_state_dict(path)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match=r"ema\.pt is not a regular file"):
        load_state_dict(tmp_path / "ema.pt")
