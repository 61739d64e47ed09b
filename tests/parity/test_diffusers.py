"""Our networks and processes compared with the diffusers library, in both directions, by running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig, NoiseSchedule
from diffusion.guidance import classifier_free
from diffusion.plans import SamplingPlan, build_plan
from diffusion.respacing import respace
from diffusion.unet import UNet
from diffusion.update import PlanRows, advance, sample_loop
from formats.checkpoint import load_unet, shapes_of, write_checkpoint
from formats.checkpoint_config import CheckpointError, read_config
from interchange.diffusers_config import (
    DoesNotMap,
    SchedulerConfig,
    UNet2DConfig,
    parse_unet,
    scheduler_json,
    to_diffusion_config,
    to_model_config,
    to_scheduler_config,
    to_unet_config,
    unet_json,
)
from interchange.diffusers_weights import expected_weights, from_diffusers, to_diffusers
from interchange.import_diffusers import describe_folder, import_folder, open_folder
from interchange.published import PUBLISHED
from interchange.sanity_check import SanityReport
from model_export.diffusers_export import export_diffusers
from tests import golden
from tests.paths import BUNDLED

M = TypeVar("M", bound=torch.nn.Module)

TOLERANCE = golden.NETWORK_TOLERANCE
"""Largest difference of two outputs over the largest output."""

MAPPABLE = ("imp_uncond", "imp_cond_ls", "adm_new", "adm_legacy")
"""The golden networks that map; the others have other heads in the decoder, or a low-resolution input."""


def _config(model: ModelConfig, **diffusion: Any) -> CheckpointConfig:
    variance = "learned_range" if model.learn_sigma else "fixed_large"
    return CheckpointConfig(model=model, diffusion=DiffusionConfig.model_validate({"variance": variance, **diffusion}))


def _checkpoint(tmp_path: Path, name: str) -> Path:
    if name == "fashion32":
        return BUNDLED
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, _config(golden.model_config(name)), golden.network(name).state_dict())
    return folder


def _random_checkpoint(tmp_path: Path, **changes: Any) -> Path:
    fields = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    model = ModelConfig.model_validate({**fields, "attention_resolutions": (4,), "num_heads": 2, **changes})
    network = _shaken(UNet(model))
    write_checkpoint(tmp_path / "checkpoint", _config(model), network.state_dict())
    return tmp_path / "checkpoint"


def _shaken(network: M) -> M:
    """Move every weight off its initial value: zeros and ones would hide a weight in the wrong place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def _inputs(model: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(3, *model.image_shape, generator=generator)
    t = torch.tensor([0.0, 17.25, 999.0])
    y = None if model.num_classes is None else torch.tensor([0, 1, model.num_labels - 1])
    return x_t, t, y


def _relative_error(theirs: UNet2DModel, ours: UNet) -> float:
    x_t, t, y = _inputs(ours.config)
    with torch.no_grad():
        actual, expected = theirs.eval()(x_t, t, class_labels=y).sample, ours(x_t, t, y)
    assert actual.shape == expected.shape
    assert expected.std() > 0.01
    return float((actual - expected).abs().max() / expected.abs().max())


def _import(path: Path, out: Path, **how: Any) -> CheckpointConfig:
    """Import without the sanity check, which these untrained networks fail; the tests of the commands run it."""
    folder = open_folder(path, how.pop("scheduler", None))
    with pytest.MonkeyPatch.context() as patch:
        report = SanityReport(None, True, "not made")
        patch.setattr("interchange.import_openai.check_predictions", lambda *_: report)
        assert import_folder(folder, describe_folder(folder, **how), out) is report
    config = read_config(out)
    assert isinstance(config, CheckpointConfig)
    return config


# --- out


@pytest.mark.parametrize("name", [*MAPPABLE, "fashion32"])
def test_an_exported_network_predicts_the_same_in_diffusers(tmp_path: Path, name: str) -> None:
    checkpoint = _checkpoint(tmp_path, name)
    export_diffusers(checkpoint, tmp_path / "out")
    assert _relative_error(UNet2DModel.from_pretrained(tmp_path / "out"), load_unet(checkpoint)[1]) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_resample": False},
        {"conv_resample": False, "resblock_updown": True},
        {"attention_resolutions": (), "num_heads_upsample": 1, "resblock_updown": True},
        {"attention_resolutions": (8, 4), "channel_mult": (1, 1), "num_heads": 4},
        {"attention_resolutions": (8, 4), "num_heads": 1},
        {"attention_resolutions": (8, 4), "num_head_channels": 16, "attention_order": "new"},
        {"model_channels": 64, "channel_mult": (1, 1.5, 0.5), "num_res_blocks": 2, "num_head_channels": 16},
        {"channel_mult": (1,), "attention_resolutions": ()},
        {"num_classes": 5, "null_class": True, "image_channels": 1, "learn_sigma": False},
    ],
    ids=str,
)
def test_every_kind_of_network_survives_a_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = _random_checkpoint(tmp_path, **changes)
    export_diffusers(checkpoint, tmp_path / "out")

    assert _relative_error(UNet2DModel.from_pretrained(tmp_path / "out"), load_unet(checkpoint)[1]) < TOLERANCE
    assert _import(tmp_path / "out", tmp_path / "back").model == load_unet(checkpoint)[0].model
    assert _same_bytes(checkpoint, tmp_path / "back")


@pytest.mark.parametrize("name", [*MAPPABLE, "fashion32"])
def test_a_round_trip_gives_the_same_weights_byte_for_byte(tmp_path: Path, name: str) -> None:
    checkpoint = _checkpoint(tmp_path, name)
    export_diffusers(checkpoint, tmp_path / "out")
    back = _import(tmp_path / "out", tmp_path / "back")

    assert _same_bytes(checkpoint, tmp_path / "back")
    assert back.replace(provenance={}) == load_unet(checkpoint)[0].replace(provenance={})


def _same_bytes(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_an_export_without_our_file_still_imports_and_predicts_the_same(tmp_path: Path) -> None:
    export_diffusers(_checkpoint(tmp_path, "adm_legacy"), tmp_path / "out")
    (tmp_path / "out" / "iddpm.json").unlink()
    config = _import(tmp_path / "out", tmp_path / "back")

    assert config.model.attention_order == "new"  # not recorded; q, k and v one after the other is equivalent
    theirs = UNet2DModel.from_pretrained(tmp_path / "out")
    assert _relative_error(theirs, load_unet(tmp_path / "back")[1]) < TOLERANCE
    assert _relative_error(theirs, golden.network("adm_legacy")) < TOLERANCE


def test_averaging_becomes_a_convolution_if_our_file_is_missing(tmp_path: Path) -> None:
    checkpoint = _random_checkpoint(tmp_path, conv_resample=False)
    export_diffusers(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "iddpm.json").unlink()
    assert _import(tmp_path / "out", tmp_path / "back").model.conv_resample

    (_, averaging), (_, convolving) = load_unet(checkpoint), load_unet(tmp_path / "back")
    x_t, t, _ = _inputs(averaging.config)
    torch.testing.assert_close(convolving(x_t, t), averaging(x_t, t), rtol=0, atol=TOLERANCE)


def test_unet_scheduler_and_pipeline_load_from_the_same_folder(tmp_path: Path) -> None:
    export_diffusers(_checkpoint(tmp_path, "adm_legacy"), tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)

    scheduler = DDPMScheduler.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config == scheduler.config
    assert (scheduler.config.num_train_timesteps, scheduler.config.variance_type) == (4000, "learned_range")
    images = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.1


def test_a_conditional_network_has_no_pipeline(tmp_path: Path) -> None:
    export_diffusers(_checkpoint(tmp_path, "imp_cond_ls"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "iddpm.json",
        "scheduler_config.json",
    }


def test_the_library_knows_every_field_that_is_written(tmp_path: Path) -> None:
    export_diffusers(_checkpoint(tmp_path, "adm_new"), tmp_path / "out")
    for library_class in (UNet2DModel, DDPMScheduler):
        content = library_class.load_config(tmp_path / "out")
        _, unused = library_class.from_config(content, return_unused_kwargs=True)
        assert unused.keys() == {"_class_name", "_diffusers_version"}


def test_our_defaults_are_the_library_s() -> None:
    with torch.device("meta"):
        config = UNet2DModel().config
    unet = {name: value for name, value in config.items() if not name.startswith("_")}
    assert UNet2DConfig().model_dump() == unet
    schedulers = {**DDIMScheduler().config, **DDPMScheduler().config}
    expected = {name: value for name, value in schedulers.items() if not name.startswith("_")}
    assert SchedulerConfig().model_dump() == expected


PUBLISHED_UNETS = {
    name: model.config for name, model in PUBLISHED.items() if isinstance(model.config, CheckpointConfig)
}
PUBLISHED_MAPPABLE = (
    *("cifar10-uncond-50m", "cifar10-uncond-vlb-50m", "lsun-bedroom-256-1200k", "lsun-bedroom-256-2400k"),
    *("adm-imagenet64", "adm-imagenet256", "adm-imagenet256-uncond"),
    *("adm-lsun-bedroom", "adm-lsun-cat", "adm-lsun-horse", "adm-lsun-horse-nodropout"),
)


@pytest.mark.parametrize("name", PUBLISHED_MAPPABLE)
def test_published_networks_get_exactly_the_library_s_names_and_shapes(name: str) -> None:
    model = PUBLISHED_UNETS[name].model
    with torch.device("meta"):
        theirs = UNet2DModel.from_config(unet_json(to_unet_config(model)))
    assert shapes_of(expected_weights(model)) == shapes_of(theirs.state_dict())
    assert to_scheduler_config(PUBLISHED_UNETS[name].diffusion).num_train_timesteps in (1000, 4000)


def test_the_other_published_networks_do_not_map() -> None:
    assert len(PUBLISHED_UNETS) == 19
    for name in PUBLISHED_UNETS.keys() - {*PUBLISHED_MAPPABLE}:
        with pytest.raises(DoesNotMap):
            to_unet_config(PUBLISHED_UNETS[name].model)


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_an_export_does_not_change_an_occupied_folder(tmp_path: Path, occupied: str) -> None:
    out = tmp_path / "out"
    if occupied == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "config.json").write_text("precious")
    with pytest.raises(CheckpointError, match="must not exist or must be an empty folder; it was not changed"):
        export_diffusers(BUNDLED, out)
    assert (out if occupied == "file" else out / "config.json").read_text() == "precious"


def test_an_export_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("formats.atomic_folder._sync_tree", fail)
    with pytest.raises(OSError, match="disk full"):
        export_diffusers(BUNDLED, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- in

SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "three levels": {
        "block_out_channels": (32, 96, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "ADM": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 32,
    },
    "not square": {"sample_size": (8, 16)},
    "8 groups": {
        "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
    },
    "attention everywhere": {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "dropout": 0.1,
    },
    "one head": {"attention_head_dim": None, "act_fn": "swish"},
    "sines first": {"flip_sin_to_cos": False},
    "classes": {"num_class_embeds": 7, "in_channels": 1, "out_channels": 1},
    "learned variance": {"out_channels": 6},
    "names of the first version": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
}


def _theirs(folder: Path, fields: dict[str, Any] | None = None) -> UNet2DModel:
    """Make a network of random weights with the library, and save it with a scheduler."""
    torch.manual_seed(0)
    unet = _shaken(UNet2DModel(**{**SMALL, **(fields or {})}))
    unet.save_pretrained(folder)
    variance = "fixed_small" if unet.config.out_channels == unet.config.in_channels else "learned_range"
    DDPMScheduler(variance_type=variance).save_pretrained(folder)
    return unet


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_an_imported_network_predicts_what_it_did_in_diffusers(tmp_path: Path, fields: dict[str, Any]) -> None:
    unet = _theirs(tmp_path / "theirs", fields)
    config = _import(tmp_path / "theirs", tmp_path / "ours")

    assert _relative_error(unet, load_unet(tmp_path / "ours")[1]) < TOLERANCE
    assert config.provenance["source"] == "diffusers"
    assert len(config.provenance["file_sha256"]) == 64


def test_a_pipeline_imports_from_its_folder_and_from_its_unet(tmp_path: Path) -> None:
    unet = _theirs(tmp_path / "unet")
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")

    for number, path in enumerate((tmp_path / "pipeline", tmp_path / "pipeline" / "unet")):
        config = _import(path, tmp_path / f"ours{number}")
        assert config.diffusion == DiffusionConfig(
            num_timesteps=1000, noise_schedule="cosine", variance="fixed_small", prediction="x0"
        )
        assert _relative_error(unet, load_unet(tmp_path / f"ours{number}")[1]) < TOLERANCE


def test_a_scheduler_may_be_named(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs")
    scheduler = (tmp_path / "theirs" / "scheduler_config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(
        CheckpointError, match=r"has no scheduler_config\.json, which describes the process .*--scheduler"
    ):
        open_folder(tmp_path / "theirs")
    assert _import(tmp_path / "theirs", tmp_path / "ours", scheduler=scheduler).diffusion.num_timesteps == 1000


def test_the_last_label_may_stand_for_no_label(tmp_path: Path) -> None:
    unet = _theirs(tmp_path / "theirs", {"num_class_embeds": 7})
    config = _import(tmp_path / "theirs", tmp_path / "ours", null_class=True)
    assert (config.model.num_classes, config.model.null_class) == (6, True)
    assert _relative_error(unet, load_unet(tmp_path / "ours")[1]) < TOLERANCE


def test_attention_weights_of_old_files_are_read(tmp_path: Path) -> None:
    unet = _theirs(tmp_path / "theirs")
    path = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new_name, old_name in old.items():
        weights = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in weights.items()}
    assert "mid_block.attentions.0.query.weight" in weights
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)

    _import(tmp_path / "theirs", tmp_path / "ours")
    assert _relative_error(unet, load_unet(tmp_path / "ours")[1]) < TOLERANCE


def test_extra_fields_of_ema_and_old_versions_are_ignored(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs")
    _edit(tmp_path / "theirs" / "config.json", decay=0.9999, optimization_step=3, power=0.75, from_nowhere=None)
    _edit(tmp_path / "theirs" / "scheduler_config.json", tensor_format="pt", timestep_values=None)
    assert _import(tmp_path / "theirs", tmp_path / "ours").model.num_head_channels == 8


def test_half_precision_weights_are_widened_exactly(tmp_path: Path) -> None:
    unet = _theirs(tmp_path / "theirs").half()
    unet.save_pretrained(tmp_path / "theirs")
    _import(tmp_path / "theirs", tmp_path / "ours")
    assert _relative_error(unet.float(), load_unet(tmp_path / "ours")[1]) < TOLERANCE


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_weights_survive_a_round_trip(order: str) -> None:
    model = golden.model_config("adm_legacy").replace(attention_order=order)
    weights = dict(golden.network("adm_legacy").state_dict())
    back = from_diffusers(to_diffusers(weights, model), model, flip_sin_to_cos=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


# --- what does not map


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imp_multiattn", "num_heads, num_heads_upsample: attention_head_dim is one number .* heads of 8, 16 channels"),
        ("adm_avgpool", "num_heads, num_heads_upsample: attention_head_dim is one number .* heads of 8, 32 channels"),
        ("imp_superres", "low_res_size must be null: UNet2DModel has no low-resolution input"),
        ("adm_superres", "low_res_size must be null: UNet2DModel has no low-resolution input"),
    ],
)
def test_golden_networks_that_do_not_map_are_refused_before_anything_is_written(
    tmp_path: Path, name: str, message: str
) -> None:
    checkpoint = _checkpoint(tmp_path, name)
    with pytest.raises(DoesNotMap, match=message):
        export_diffusers(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", ["imp_multiattn", "adm_avgpool"])
def test_the_decoder_s_heads_are_the_only_obstacle_of_these_golden_networks(tmp_path: Path, name: str) -> None:
    model = golden.model_config(name).replace(num_heads_upsample=None)
    write_checkpoint(tmp_path / "checkpoint", _config(model), golden.network(name).state_dict())
    export_diffusers(tmp_path / "checkpoint", tmp_path / "out")
    theirs = UNet2DModel.from_pretrained(tmp_path / "out")
    assert _relative_error(theirs, load_unet(tmp_path / "checkpoint")[1]) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "diffusion", "message"),
    [
        ({"channel_mult": (2, 2)}, {}, "channel_mult must begin with 1: .* got 2"),
        (
            {"channel_mult": (1, 2), "attention_resolutions": (8, 4), "num_heads": 4},
            {},
            "one number for all levels, encoder and decoder; got heads of 8, 16 channels",
        ),
        ({}, {"variance": "learned"}, "in the library 'learned' is a variance, here it is a log variance"),
        ({}, {"num_timesteps": 500, "rescale_timesteps": True}, "must be a multiple of 1000; got 500"),
    ],
)
def test_a_network_or_process_that_diffusers_cannot_describe_is_refused(
    model: dict[str, Any], diffusion: dict[str, Any], message: str
) -> None:
    fields = {"image_size": 8, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": (), **model}
    network, process = ModelConfig.model_validate(fields), DiffusionConfig.model_validate(diffusion)
    with pytest.raises(DoesNotMap, match=message):
        (to_unet_config(network), to_scheduler_config(process))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"center_input_sample": True}, "center_input_sample must be False: .*; got True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional'"),
        ({"freq_shift": 1}, r"freq_shift must be 0: the frequencies of the time embedding are .*; got 1\.0"),
        ({"mid_block_type": None}, "mid_block_type must be 'UNetMidBlock2D'"),
        ({"mid_block_scale_factor": 1.4142}, "mid_block_scale_factor must be 1"),
        ({"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish'"),
        ({"attn_norm_num_groups": 16}, r"attn_norm_num_groups must be norm_num_groups \(32\)"),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups must be 32: with null .* has no normalisation",
        ),
        ({"norm_eps": 1e-6}, r"norm_eps must be 1e-05: .*; got 1e-06"),
        ({"add_attention": False}, "add_attention must be True"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be 'default' or 'scale_shift'"),
        ({"downsample_padding": 0}, "downsample_padding must be 1: 0 pads the right and lower edges only"),
        ({"time_embedding_dim": 64}, "time_embedding_dim must be null or 128"),
        ({"sample_size": None}, r"sample_size must be the size of the images in pixels, a number or \[height, width\]"),
        ({"in_channels": 6}, "out_channels must be in_channels, or twice that .* got 3 for 6"),
        (
            {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")},
            "down_block_types must be among .* SkipDownBlock2D",
        ),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types must have attention at the same levels"),
        ({"upsample_type": "resnet"}, "levels must be resampled by convolutions .*; got conv, resnet"),
        ({"block_out_channels": (32,)}, "must have one entry per level; got 1, 2 and 2"),
    ],
    ids=str,
)
def test_an_unsupported_unet2dmodel_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DoesNotMap, match=message):
        to_model_config(UNet2DConfig.model_validate({**SMALL, **fields}))


def test_a_null_class_needs_labels() -> None:
    with pytest.raises(DoesNotMap, match="num_class_embeds must be at least 2 with a null class; got None"):
        to_model_config(UNet2DConfig.model_validate(SMALL), null_class=True)


def test_all_reasons_are_reported_together() -> None:
    """The config.json of google/ddpm-cat-256, like that of related models: three reasons, none of them in weights."""
    fields = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "center_input_sample": False,
        "down_block_types": [*4 * ["DownBlock2D"], "AttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *4 * ["UpBlock2D"]],
    }
    with pytest.raises(DoesNotMap) as caught:
        to_model_config(parse_unet(fields))
    names = [line.split()[0] for line in str(caught.value).splitlines()[1:]]
    assert names == ["freq_shift", "norm_eps", "downsample_padding"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be null"),
        (
            {"beta_schedule": "scaled_linear"},
            "beta_schedule must be 'linear' or 'squaredcos_cap_v2'; got 'scaled_linear'",
        ),
        ({"num_train_timesteps": 500}, r"beta_start must be 0\.0002: .* T = num_train_timesteps = 500; got 0\.0001"),
        ({"beta_end": 0.012}, r"beta_end must be 0\.02: .*; got 0\.012"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False"),
        ({"variance_type": "learned"}, "variance_type must be one of .*; got 'learned' .*but a log variance here"),
        ({"variance_type": "fixed_large_log"}, "got 'fixed_large_log' .*square root of a negative logarithm"),
        ({"prediction_type": "v_prediction"}, "prediction_type must be 'epsilon' or 'sample'; got 'v_prediction'"),
    ],
    ids=str,
)
def test_an_unsupported_scheduler_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DoesNotMap, match=message):
        to_diffusion_config(SchedulerConfig.model_validate(fields))


def _folder_with(tmp_path: Path, file: str, **changes: Any) -> Path:
    _theirs(tmp_path / "theirs")
    _edit(tmp_path / "theirs" / file, **changes)
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "_class_name must be UNet2DModel; got 'UNet2DCond"),
        ("config.json", {"cross_attention_dim": 768}, "cross_attention_dim: Extra inputs are not permitted"),
        ("config.json", {"block_out_channels": "many"}, "block_out_channels: "),
        ("config.json", {"block_out_channels": [0, 0]}, r"block_out_channels\.0: Input should be greater than 0"),
        ("config.json", {"block_out_channels": [40, 64], "norm_eps": 1e-5}, "40 is 40"),
        ("scheduler_config.json", {"_class_name": "PNDMScheduler"}, "_class_name must be DDPMScheduler or DDIMSchedul"),
        ("scheduler_config.json", {"variance_type": "learned_range"}, "variance_type must be a fixed kind for .* 3"),
        ("scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps: Input should be greater than 0"),
        ("scheduler_config.json", {"new_in_2030": 1}, "new_in_2030: Extra inputs are not permitted"),
    ],
)
def test_a_folder_with_unsupported_contents_is_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = _folder_with(tmp_path, file, **changes)
    with pytest.raises(CheckpointError, match=message):
        describe_folder(open_folder(folder))


def test_network_and_process_are_refused_together(tmp_path: Path) -> None:
    folder = _folder_with(tmp_path, "scheduler_config.json", prediction_type="v_prediction")
    _edit(folder / "config.json", freq_shift=1)
    with pytest.raises(CheckpointError, match=r"(?s)freq_shift must be 0.*prediction_type must be"):
        describe_folder(open_folder(folder))


def test_a_ddim_scheduler_gives_a_fixed_variance_and_a_note(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "theirs")
    config = _import(tmp_path / "theirs", tmp_path / "ours")
    assert config.diffusion.variance == "fixed_small"
    clip, variance = config.provenance["notes"]
    assert clip.startswith("clip_sample=False, clip_sample_range=1, thresholding=False: ignored")
    assert variance.startswith("a DDIMScheduler specifies no variance; fixed_small")


def test_a_ddim_scheduler_is_refused_for_a_learned_variance(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs", {"out_channels": 6})
    DDIMScheduler().save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"variance_type must be learned_range for .* got a DDIMSch"):
        describe_folder(open_folder(tmp_path / "theirs"))


def test_pickled_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs").save_pretrained(tmp_path / "theirs", safe_serialization=False)
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin instead of .* pickles.*save_pretrained"):
        open_folder(tmp_path / "theirs")


def test_sharded_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs").save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    with pytest.raises(
        CheckpointError, match=r"has no .*\(it has .*index\.json: load it with diffusers and save it as a single file"
    ):
        open_folder(tmp_path / "theirs")


def test_weights_that_do_not_fit_are_reported_by_the_library_s_names(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs")
    path = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_extra.weight"] = weights.pop("conv_out.weight").clone()
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(conv_out\.weight\); 1 not expected \(conv_extra\.weight\)"):
        _import(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_latent_diffusion_models_are_refused(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs" / "unet")
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "theirs" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="it also has vqvae, so its network does not work on pixels"):
        open_folder(tmp_path / "theirs")


def test_other_folders_are_refused_with_a_description(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a diffusers folder: it has no config\.json and no unet/config"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is a checkpoint folder of iddpm already"):
        open_folder(BUNDLED)


@pytest.mark.parametrize(
    ("file", "changes"), [("config.json", {"dropout": 0.5}), ("scheduler_config.json", {"prediction_type": "sample"})]
)
def test_an_export_changed_later_is_detected(tmp_path: Path, file: str, changes: dict[str, Any]) -> None:
    export_diffusers(_checkpoint(tmp_path, "imp_uncond"), tmp_path / "out")
    _edit(tmp_path / "out" / file, **changes)
    with pytest.raises(
        CheckpointError, match=r"changed after the export; delete iddpm\.json to import the changed configuration"
    ):
        open_folder(tmp_path / "out")


def test_averaging_layers_that_were_trained_are_not_dropped(tmp_path: Path) -> None:
    export_diffusers(_random_checkpoint(tmp_path, conv_resample=False), tmp_path / "out")
    path = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["down_blocks.0.downsamplers.0.conv.bias"] += 1
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"down_blocks\.0\.downsamplers\.0\.conv has trained weights"):
        _import(tmp_path / "out", tmp_path / "back")


# --- the process

PROCESSES: dict[str, DiffusionConfig] = {
    "linear": DiffusionConfig(num_timesteps=1000, noise_schedule="linear", variance="fixed_large"),
    "linear, T = 4000": DiffusionConfig(num_timesteps=4000, noise_schedule="linear"),
    "cosine": DiffusionConfig(num_timesteps=1000, noise_schedule="cosine", variance="fixed_small"),
    "cosine, T = 4000": DiffusionConfig(num_timesteps=4000, noise_schedule="cosine"),
    "predicts x0": DiffusionConfig(num_timesteps=1000, noise_schedule="cosine", prediction="x0"),
    "rescaled": DiffusionConfig(num_timesteps=4000, noise_schedule="cosine", rescale_timesteps=True),
}


def _their_scheduler(diffusion: DiffusionConfig) -> DDPMScheduler:
    return DDPMScheduler.from_config(scheduler_json(to_scheduler_config(diffusion)))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_the_schedules_have_the_same_betas(schedule: NoiseSchedule, steps: int) -> None:
    diffusion = DiffusionConfig(num_timesteps=steps, noise_schedule=schedule)
    theirs, ours = _their_scheduler(diffusion), respace(diffusion).schedule
    # The library stores them in float32; alphas_cumprod is their product in float32.
    np.testing.assert_allclose(theirs.betas.numpy(), ours.betas, rtol=2e-7)
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.alphas_cumprod, rtol=5e-5)
    assert to_diffusion_config(to_scheduler_config(diffusion)) == diffusion


def test_rescaled_timesteps_become_every_fourth_step_of_the_process() -> None:
    theirs = _their_scheduler(PROCESSES["rescaled"])
    ours = respace(PROCESSES["rescaled"])
    assert theirs.config.num_train_timesteps == 1000
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.schedule.alphas_cumprod[::4], rtol=5e-5)
    np.testing.assert_array_equal(ours.t_model[::4], np.arange(1000))  # the library passes t itself to the network


@pytest.mark.parametrize("num_steps", [50, 100, 250])
def test_a_chain_of_n_steps_visits_the_same_timesteps(num_steps: int) -> None:
    for diffusion in (PROCESSES["linear"], PROCESSES["cosine, T = 4000"]):
        scheduler = _their_scheduler(diffusion)
        scheduler.set_timesteps(num_steps)
        expected = respace(diffusion, str(num_steps)).timestep_map[::-1]
        np.testing.assert_array_equal(scheduler.timesteps.numpy(), expected)


def _start(diffusion: DiffusionConfig, spec: str) -> tuple[DDPMScheduler, SamplingPlan]:
    """Make the library's chain and ours, of all timesteps or of 100."""
    scheduler = _their_scheduler(diffusion)
    if not diffusion.rescale_timesteps:
        if spec:
            scheduler.set_timesteps(int(spec))
        return scheduler, build_plan(diffusion, "ancestral", spec)
    if spec:
        scheduler.set_timesteps(timesteps=list(range(990, -1, -10)))
    return scheduler, build_plan(diffusion, "ancestral", f"ddim{spec or 1000}")


def _their_step(scheduler: DDPMScheduler, z: Tensor, output: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
    """Take a step of the library's with given noise: it draws its own, which no argument changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: z)
        return scheduler.step(output, t, x_t).prev_sample


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("spec", ["", "100"])
@pytest.mark.parametrize("name", PROCESSES)
def test_one_step_has_the_same_mean_and_variance(name: str, spec: str, double: bool) -> None:
    diffusion = PROCESSES[name]
    scheduler, plan = _start(diffusion, spec)
    if double:
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    generator = torch.Generator().manual_seed(3)
    x_t, out, var_values, z = torch.randn(4, 2, 3, 4, 4, generator=generator)
    output = torch.cat([out, var_values], dim=1) if diffusion.learns_variance else out
    lines = torch.from_numpy(plan.table.copy())

    assert len(scheduler.timesteps) == plan.num_steps
    for index in (0, plan.num_steps // 3, plan.num_steps * 4 // 5, *range(plan.num_steps - 4, plan.num_steps)):
        t = scheduler.timesteps[index]
        theirs = _their_step(scheduler, z, output, t, x_t)
        rows = PlanRows.from_lines(lines[index].expand(2, -1))
        step = advance(rows, x_t, x_t, out, var_values, z, torch.zeros_like(x_t))

        assert set(rows.t_model.flatten().tolist()) == {float(t)}
        # The library computes 1 - alphas_cumprod in float32, which loses most digits at the least noisy steps: at t = 1
        # its images are off by 6e-4. With its tables in float64 they are not.
        lost = 0.0 if double else 2**-21 / (1 - float(scheduler.alphas_cumprod[t]))
        torch.testing.assert_close(step.x_prev, theirs, rtol=0, atol=golden.STEP_TOLERANCE + lost)


def test_a_guided_chain_of_the_bundled_model_gives_our_image_in_diffusers(tmp_path: Path) -> None:
    """The loop of docs/diffusers.md with labels, null class, learned variance and rescaled timesteps together."""
    export_diffusers(BUNDLED, tmp_path / "out")
    unet, scheduler = UNet2DModel.from_pretrained(tmp_path / "out"), DDPMScheduler.from_pretrained(tmp_path / "out")
    config, network = load_unet(BUNDLED)
    cfg_scale, labels, null = 2.0, torch.tensor([1, 7]), torch.tensor([10, 10])
    z = torch.randn(11, 2, 1, 32, 32, generator=torch.Generator().manual_seed(4))

    scheduler.set_timesteps(timesteps=list(range(900, -1, -100)))
    x = z[10]
    for index, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null])).sample
        conditional, unconditional = output.chunk(2)
        channels = x.shape[1]
        conditional[:, :channels] = unconditional[:, :channels].lerp(conditional[:, :channels], cfg_scale)
        x = _their_step(scheduler, z[index], conditional, t, x)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        return classifier_free(network(x_t, t, null), network(x_t, t, labels), cfg_scale, channels)

    ours = sample_loop(guided, build_plan(config.diffusion, "ancestral", "ddim10"), z[10], z)
    assert ours.std() > 0.3
    torch.testing.assert_close(x, ours, rtol=0, atol=golden.CHAIN_TOLERANCES["final"])


# --- the command line

runner = CliRunner()


def test_both_commands(tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    exported = runner.invoke(app, ["export", str(BUNDLED), str(out), "--format", "diffusers"])
    assert exported.exit_code == 0, exported.output
    assert exported.output == f"exported: {out}\n"

    imported = runner.invoke(app, ["import", str(out), "--out", str(back)])
    assert imported.exit_code == 0, imported.output
    assert "sanity check: passed" in imported.output
    assert _same_bytes(BUNDLED, back)
    config = read_config(back)
    assert config.class_names == read_config(BUNDLED).class_names
    assert config.provenance["images_seen"] == read_config(BUNDLED).provenance["images_seen"]


def test_class_names_can_be_added(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs", {"num_class_embeds": 3})
    (tmp_path / "names").write_text("cat\ndog\n")
    arguments = ["import", str(tmp_path / "theirs"), "--null-class", "--allow-failed-sanity-check"]
    result = runner.invoke(app, [*arguments, "--class-names", str(tmp_path / "names"), "--out", str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "ours").class_names == ("cat", "dog")


def test_a_network_that_predicts_nothing_is_not_imported(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs")
    result = runner.invoke(app, ["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    assert result.exit_code == 1
    assert "sanity check: FAILED" in result.output
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", str(BUNDLED), "OUT", "--format", "png"], 2, "one of onnx, tensorrt, diffusers; got 'png'"),
        (["export", "nowhere", "OUT", "--format", "diffusers"], 1, "nowhere is not a checkpoint folder"),
        (["import", str(BUNDLED), "--out", "OUT"], 1, "is a checkpoint folder of iddpm already"),
        (
            ["import", str(BUNDLED), "--repo", "guided", "--out", "OUT"],
            1,
            "--preset, --repo, --flag and --flags are for files",
        ),
        (["import", "some.pt", "--null-class", "--out", "OUT"], 1, "some.pt does not exist"),
        (["import", __file__, "--null-class", "--out", "OUT"], 1, "are for diffusers folders; "),
    ],
)
def test_commands_fail_with_one_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = runner.invoke(app, [str(tmp_path / "out") if word == "OUT" else word for word in arguments])
    assert result.exit_code == code
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "out").exists()
