"""The published checkpoints: every preset builds a network with exactly the file's weight names and shapes."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

import pytest

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from formats.checkpoint import expected_shapes
from interchange.openai_flags import config_from_flags
from interchange.openai_shapes import describe_mismatch, read_flags
from interchange.published import PUBLISHED, PublishedModel
from tests.golden import GOLDEN_DIR

MODELS = pytest.mark.parametrize("model", PUBLISHED.values(), ids=list(PUBLISHED))


@cache
def _manifests() -> dict[str, Any]:
    with gzip.open(GOLDEN_DIR / "ckpt_manifests.json.gz", "rt", encoding="utf-8") as file:
        return {entry["url"]: entry for entry in json.load(file).values()}


def _shapes(model: PublishedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in _manifests()[model.url]["state_dict"].items()}


def test_every_published_file_has_a_preset() -> None:
    assert len(PUBLISHED) == 23
    assert {model.url for model in PUBLISHED.values()} == set(_manifests())


@MODELS
def test_preset_has_the_weight_names_and_shapes_of_its_file(model: PublishedModel) -> None:
    assert dict(expected_shapes(model.config)) == _shapes(model)
    assert describe_mismatch(model.config, _shapes(model)) == []


@MODELS
def test_preset_has_the_process_of_its_file(model: PublishedModel) -> None:
    manifest = _manifests()[model.url]
    theirs, effective, ours = manifest["diffusion"], manifest["effective"], model.config.diffusion

    assert ours.num_timesteps == theirs["num_timesteps"]
    assert ours.variance == theirs["model_var_type"].lower()
    assert ours.rescale_timesteps == theirs["rescale_timesteps"]
    assert ours.noise_schedule == effective["noise_schedule"]
    assert theirs["model_mean_type"] == "EPSILON"
    assert ours.prediction == "eps"


@MODELS
def test_preset_has_the_flags_that_shapes_do_not_determine(model: PublishedModel) -> None:
    effective, config = _manifests()[model.url]["effective"], model.config.model
    assert config.image_size == effective.get("image_size", effective.get("large_size"))
    if isinstance(model.config, CheckpointConfig):
        assert config.dropout == effective["dropout"]
        assert (config.num_head_channels or -1) == effective.get("num_head_channels", -1)
        assert config.num_heads == effective["num_heads"]
        assert (model.config.model.num_heads_upsample or -1) == effective["num_heads_upsample"]
        assert (config.attention_order == "new") == effective.get("use_new_attention_order", False)
        assert model.config.model.low_res_size == effective.get("small_size")
    else:
        assert config.num_head_channels == 64
        assert config.attention_order == "legacy"


@MODELS
def test_readme_flags_resolve_to_the_preset(model: PublishedModel) -> None:
    manifest = _manifests()[model.url]
    flags = dict(manifest["flags"])
    if manifest["kind"] == "superres":
        flags.setdefault("large_size", "256")  # the default of that script
    if manifest["kind"] == "classifier":
        flags.setdefault("classifier_depth", "2")

    config = config_from_flags(model.repo, flags)

    assert config.model == model.config.model
    assert config.diffusion == model.config.diffusion


@MODELS
def test_flags_can_be_read_back_from_the_shapes(model: PublishedModel) -> None:
    config = model.config.model
    flags = read_flags(_shapes(model), config.image_height)

    assert flags["num_channels"] == str(config.model_channels)
    assert flags["channel_mult"] == ",".join(f"{mult:g}" for mult in config.channel_mult)
    assert flags["num_res_blocks"] == str(config.num_res_blocks)
    assert flags["attention_resolutions"] == ",".join(map(str, sorted(config.attention_resolutions, reverse=True)))
    assert flags["resblock_updown"] == str(config.resblock_updown)
    assert flags["use_scale_shift_norm"] == str(config.use_scale_shift_norm)
    assert (flags["kind"] == "noisy classifier") == isinstance(model.config, ClassifierCheckpointConfig)
