from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from diffusion.config import (
    CheckpointConfig,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SamplingDefaults,
)
from diffusion.schedules import Schedule, named_betas

SMALL: dict[str, Any] = {
    "image_size": 32,
    "model_channels": 32,
    "channel_mult": [1, 2, 2],
    "attention_resolutions": [16, 8],
}


def _model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **changes})


def test_a_checkpoint_config_survives_a_round_trip_through_json() -> None:
    config = CheckpointConfig(
        model=_model(num_classes=3, null_class=True),
        diffusion=DiffusionConfig(),
        class_names=("a", "b", "c"),
        sampling=SamplingDefaults(cfg_scale=2.0),
        provenance={"images_seen": 7},
    )

    assert CheckpointConfig.model_validate_json(config.model_dump_json()) == config


def test_levels_follow_from_the_multipliers() -> None:
    config = _model(channel_mult=[1, 1.5, 2], model_channels=64)

    assert config.level_channels == (64, 96, 128)
    assert config.level_sizes == (32, 16, 8)
    assert config.emb_channels == 256


def test_images_need_not_be_square() -> None:
    config = _model(image_size=[16, 32], channel_mult=[1, 1, 2], attention_resolutions=[8, 4])
    assert config.image_shape == (3, 16, 32)
    assert config.level_sizes == (16, 8, 4)  # heights: the factors are 1, 2 and 4
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match=r"must name heights of levels, which are \[16, 8, 4\]; got 32"):
        config.replace(attention_resolutions=[32])


def test_a_square_is_described_by_one_number() -> None:
    config = _model(image_size=[32, 32])
    assert config == _model()
    assert config.model_dump(mode="json")["image_size"] == 32


def test_channels_follow_from_the_kind_of_model() -> None:
    assert _model(image_channels=1).out_channels == 2
    assert _model(image_channels=1, learn_sigma=False).out_channels == 1
    assert _model(low_res_size=8).in_channels == 6
    assert _model(low_res_size=8).cond_shape == (3, 32, 32)
    assert (_model(cond_channels=5).in_channels, _model(cond_channels=5).cond_shape) == (8, (5, 32, 32))
    assert _model().cond_shape is None
    assert _model().num_labels == 0
    assert _model(num_classes=10, null_class=True).num_labels == 11


def test_replace_validates() -> None:
    assert _model().replace(dropout=0.1).dropout == 0.1
    with pytest.raises(ValidationError, match="dropout"):
        _model().replace(dropout=1.0)


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _model().dropout = 0.5  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chanel_mult": [1]}, "chanel_mult"),
        ({"image_size": 30}, "image_size must be a multiple of 4"),
        ({"image_size": [32, 30]}, r"image_size must be a multiple of 4: .* got \[32, 30\]"),
        ({"image_size": [32, 0]}, r"(?s)image_size.*greater than 0"),
        ({"image_size": [32]}, "image_size"),
        ({"image_channels": 33}, "image_channels"),
        ({"image_size": [16, 8], "low_res_size": [8, 16]}, r"at most image_size \(\[16, 8\]\); got \[8, 16\]"),
        ({"model_channels": 40}, r"must be a multiple of norm_groups \(32\)"),
        ({"norm_groups": 24}, r"must be a multiple of norm_groups \(24\); 1 x 32 is 32"),
        ({"channel_mult": [0.01, 1, 1]}, r"must be a multiple of norm_groups \(32\)"),
        ({"channel_mult": []}, "channel_mult"),
        ({"attention_resolutions": [7]}, r"attention_resolutions must name sizes of levels, which are \[32, 16, 8\]"),
        ({"num_heads": 5}, "num_heads must divide the 64 channels"),
        ({"num_head_channels": 48}, "num_head_channels must divide the 64 channels"),
        ({"null_class": True}, "null_class needs num_classes"),
        ({"low_res_size": 64}, "low_res_size must be at most image_size"),
        ({"low_res_size": 8, "cond_channels": 3}, "cond_channels must be 0 with low_res_size"),
        ({"attention_order": "newer"}, "attention_order"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_by_field_and_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _model(**changes)


def test_an_attention_pool_needs_the_width_of_its_heads() -> None:
    with pytest.raises(ValidationError, match="num_head_channels is required by pool 'attention'"):
        ClassifierConfig.model_validate({**SMALL, "num_classes": 10})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": DiffusionConfig(variance="fixed_small")}, "model.learn_sigma must be False"),
        ({"class_names": ("a", "b")}, "class_names must have one name per class"),
        ({"sampling": SamplingDefaults(cfg_scale=2.0)}, "needs model.null_class"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_a_checkpoint_whose_parts_disagree_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CheckpointConfig.model_validate({"model": _model(num_classes=3), "diffusion": DiffusionConfig(), **changes})


def test_a_linear_schedule_needs_more_than_20_timesteps() -> None:
    for few in (2, 20):
        with pytest.raises(ValidationError, match=f"num_timesteps must be above 20 for noise_schedule 'linear'.*{few}"):
            DiffusionConfig(num_timesteps=few, noise_schedule="linear")
        DiffusionConfig(num_timesteps=few, noise_schedule="cosine")
    assert Schedule(named_betas("linear", 21)).alphas_cumprod.min() > 0
    DiffusionConfig(num_timesteps=21, noise_schedule="linear")
