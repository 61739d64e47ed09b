from __future__ import annotations

import numpy as np
import pytest

from benchmarks.conditioning import (
    Agreement,
    ConditioningError,
    Likeness,
    Outcome,
    Setting,
    balanced_labels,
    confusion_line,
    dark_frames,
    report,
    saturated,
    settings_of,
    wilson_interval,
)
from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig, SamplingDefaults

NAMES = ("shirt", "bag", "boot")


def _agreement() -> Agreement:
    requested = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    judged = np.array([0, 2, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2])
    return Agreement.from_predictions(requested, judged, 3)


def _config(num_classes: int | None = 10, null_class: bool = True, cfg_scale: float = 2.0) -> CheckpointConfig:
    return CheckpointConfig(
        model=ModelConfig(
            image_size=8,
            image_channels=1,
            model_channels=32,
            channel_mult=(1,),
            attention_resolutions=(),
            num_classes=num_classes,
            null_class=null_class,
        ),
        diffusion=DiffusionConfig(num_timesteps=10),
        sampling=SamplingDefaults(cfg_scale=cfg_scale),
    )


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 1000])
def test_wilson_interval_contains_the_proportion_and_stays_within_0_and_1(trials: int) -> None:
    for successes in range(trials + 1):
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_interval_refuses_impossible_counts(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_agreement_counts_requested_by_judged() -> None:
    agreement = _agreement()
    assert agreement.counts.tolist() == [[1, 2, 1], [1, 3, 0], [0, 0, 4]]
    assert (agreement.agreed, agreement.total) == (8, 12)
    assert agreement.rate == pytest.approx(2 / 3)
    assert agreement.class_rates.tolist() == [0.25, 0.75, 1.0]


def test_a_class_never_requested_has_no_rate_and_is_not_among_the_worst() -> None:
    agreement = Agreement.from_predictions(np.array([0, 0]), np.array([0, 2]), 3)
    assert np.isnan(agreement.class_rates[1:]).all()
    assert agreement.worst(3) == [0]


def test_confusions_list_the_worst_classes_first_and_omit_perfect_ones() -> None:
    agreement = _agreement()
    assert agreement.worst(3) == [0, 1]
    assert agreement.mistaken_for(0) == [(1, 2), (2, 1)]
    assert confusion_line(agreement, NAMES) == "shirt 1 of 4 (else bag 2, boot 1); bag 3 of 4 (else shirt 1)"


def test_labels_are_balanced_or_refused() -> None:
    assert balanced_labels(6, 3).tolist() == [0, 1, 2, 0, 1, 2]
    for images in (0, 7, -3):
        with pytest.raises(ConditioningError, match="--images must be a positive multiple of 3"):
            balanced_labels(images, 3)


def test_settings_are_unguided_and_recommended_unless_given() -> None:
    assert settings_of(_config(), [50], None) == [Setting(50, 1.0), Setting(50, 2.0)]
    assert settings_of(_config(cfg_scale=1.0), [50, 100], None) == [Setting(50, 1.0), Setting(100, 1.0)]
    assert settings_of(_config(), [50], [3.0]) == [Setting(50, 3.0)]


def test_models_without_classes_are_refused() -> None:
    with pytest.raises(ConditioningError, match="unconditional"):
        settings_of(_config(None, False, 1.0), [50], None)
    with pytest.raises(ConditioningError, match="null_class"):
        settings_of(_config(10, False, 1.0), [50], [2.0])


def test_the_report_contains_every_setting_and_class() -> None:
    agreement = _agreement()
    likeness = Likeness(frechet=1.5, precision=0.75, recall=0.5, dark_frames=0.98, saturated=0.0234)
    outcomes = [Outcome(Setting(50, g), agreement, likeness, seconds) for g, seconds in ((1.0, 12.3), (2.0, 24.6))]
    real = Likeness(frechet=0.25, precision=0.9, recall=0.8, dark_frames=1.0, saturated=0.02)
    lines = report({"Date": "today"}, NAMES, agreement, real, outcomes, "python -m x").splitlines()

    assert "- Date: today" in lines
    assert "| 50 | 2 | 12 | 66.7 % (39.1-86.2) | 25 % | 25 |" in lines
    assert "| shirt | 25.0 | 25 | 25 |" in lines
    assert "| as many real training images | 0.25 | 0.900 | 0.800 | 100.0 % | 2.00 % |" in lines
    assert "| 50 steps, cfg 2 | 1.50 | 0.750 | 0.500 | 98.0 % | 2.34 % |" in lines
    assert "python -m x" in lines


def test_a_frame_is_dark_if_its_mean_is() -> None:
    images = np.zeros((4, 8, 8, 1), dtype=np.uint8)
    images[:, 2:6, 2:6] = 255
    images[1, :2] = 30  # a third of the frame: 10 in the mean
    images[2, :2] = 29
    images[3] = 10
    assert dark_frames(images) == 0.5


def test_values_of_the_highest_levels_are_saturated() -> None:
    assert saturated(np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)) == 6 / 256
