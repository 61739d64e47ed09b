"""Features of sets of images: moments in batches, the cache, reference files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.images import Uint8Array
from tests.fakes import tiny_config
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.extractors import Extracted
from trainer.evaluation.feature_sets import (
    RunningMoments,
    dataset_reference,
    extract,
    file_features,
    file_reference,
)
from trainer.evaluation.metrics import moments
from trainer.evaluation.scores import score, table

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)


class Means:
    """Row means as features, corners as logits, the first column as spatial features; counts its images."""

    def __init__(self, kind: str = "onnx", sha256: str = "a" * 64) -> None:
        self.description = {"kind": kind, "file": "means.onnx", "sha256": sha256}
        self.seen = 0

    def __call__(self, pixels: Uint8Array) -> Extracted:
        self.seen += len(pixels)
        rows = pixels.astype(np.float32).mean(axis=(2, 3))
        return Extracted(
            rows, pixels[:, 0, :3, 0].astype(np.float32) / np.float32(255), pixels[:, :, 0, 0].astype(np.float32)
        )


def save(path: Path, images: Uint8Array = IMAGES) -> Path:
    labels = np.arange(len(images)) % 4
    np.savez(path, images=images, labels=labels, classes=np.array(["Ape", "Bee", "Cat", "T-shirt/top"]))
    return path


def test_moments_of_batches_are_those_of_the_whole_even_far_from_zero() -> None:
    features = np.random.default_rng(1).normal(size=(50, 4)) * 1e-3 + 1e5
    running = RunningMoments()
    for start in (0, 7, 30):
        running.add(features[start : {0: 7, 7: 30, 30: 50}[start]])
    for found, expected in zip(running.result(), moments(features), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_features_of_a_data_set_are_computed_once_per_content_and_network(tmp_path: Path) -> None:
    extractor, cache = Means(), tmp_path / "cache"
    first = dataset_reference(save(tmp_path / "a.npz"), tiny_config(), extractor, cache)
    again = dataset_reference(save(tmp_path / "moved.npz"), tiny_config(), extractor, cache)
    assert extractor.seen == 30
    assert first.features is not None
    assert again.features is not None
    assert np.array_equal(first.features, again.features)
    assert first.spatial is not None
    assert again.spatial is not None
    assert np.array_equal(first.spatial.covariance, again.spatial.covariance)
    dataset_reference(save(tmp_path / "a.npz", IMAGES[::-1].copy()), tiny_config(), extractor, cache)
    assert extractor.seen == 60
    dataset_reference(tmp_path / "a.npz", tiny_config(), Means(sha256="b" * 64), cache)
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path) -> None:
    extractor, cache = Means(), tmp_path / "cache"
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    file_features(tmp_path / "images.npz", extractor, cache)
    (stored,) = cache.iterdir()
    stored.write_bytes(stored.read_bytes()[:-40])
    again = file_features(tmp_path / "images.npz", extractor, cache)
    assert again is not None
    assert again.features.shape == (30, 8)
    assert extractor.seen == 60


def test_a_set_scores_zero_against_itself_in_every_way(tmp_path: Path) -> None:
    extractor = Means()
    reference = dataset_reference(save(tmp_path / "a.npz"), tiny_config(), extractor, tmp_path / "cache")
    scores = score(extract(extractor, [IMAGES[:13], IMAGES[13:]], 30, "images"), reference)
    assert scores["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert scores["spatial_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert (scores["precision"], scores["recall"]) == (1, 1)
    assert scores["inception_score"] > 1
    heading, (cells,) = table([{"name": "itself", "images": 30, **scores}], inception=True)
    assert heading[2:4] == ["FID", "sFID"]
    assert cells[:2] == ["itself", "30"]


def test_reference_files_hold_moments_or_images_or_both(tmp_path: Path) -> None:
    features = extract(Means(), [IMAGES], 30, "images")
    pooled, spatial = moments(features.features), features.spatial
    assert spatial is not None
    held: dict[str, Any] = {"mu": pooled.mean, "sigma": pooled.covariance}
    held |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(tmp_path / "moments.npz", **held)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    np.savez(tmp_path / "both.npz", arr_0=IMAGES, **{**held, "mu": pooled.mean + 1})
    np.savez(tmp_path / "neither.npz", other=IMAGES)

    only = score(features, file_reference(tmp_path / "moments.npz", Means(), tmp_path / "cache"))
    assert set(only) == {"frechet_distance", "spatial_frechet_distance", "inception_score"}
    assert only["frechet_distance"] == pytest.approx(0, abs=1e-6)
    images = score(features, file_reference(tmp_path / "images.npz", Means(), tmp_path / "cache"))
    assert images["precision"] == 1
    inception = score(features, file_reference(tmp_path / "both.npz", Means("inception"), tmp_path / "cache"))
    assert inception["frechet_distance"] == pytest.approx(8, abs=1e-6)
    other = score(features, file_reference(tmp_path / "both.npz", Means(), tmp_path / "cache"))
    assert other["frechet_distance"] == pytest.approx(0, abs=1e-6)  # moments in a file are Inception's
    with pytest.raises(EvaluationError, match="must contain mu and sigma, or images"):
        file_reference(tmp_path / "neither.npz", Means(), tmp_path / "cache")


def test_features_of_another_network_than_the_reference_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "moments.npz", mu=np.zeros(5), sigma=np.eye(5))
    reference = file_reference(tmp_path / "moments.npz", Means(), tmp_path / "cache")
    with pytest.raises(EvaluationError, match="5 features, --features gives 8"):
        score(extract(Means(), [IMAGES], 30, "images"), reference)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(EvaluationError, match="sigma"):
        file_reference(tmp_path / "odd.npz", Means(), tmp_path / "cache")
    with pytest.raises(EvaluationError, match="at least two images"):
        extract(Means(), [IMAGES[:1]], 1, "images")
