"""Features of sets of images, cached by the content of the set and the network, and what samples are compared with."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from diffusion.config import CheckpointConfig
from formats.atomic_file import replace_file
from formats.images import Uint8Array
from trainer.data import eight_bit_images
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.extractors import Extractor, Float32Array
from trainer.evaluation.metrics import Float64Array, Moments, moments
from trainer.evaluation.reading import content_of, open_real
from trainer.evaluation.sample_files import stored_images

BATCH = 64
"""Images per call of the network."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of N images."""

    features: Float32Array
    """[N, D]."""
    logits: Float32Array | None = None
    """[N, K]."""
    spatial: Moments | None = None
    """Moments of the spatial features, which are too large to be kept."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images that samples are compared with."""

    description: dict[str, Any]
    """The data and their number, for the results."""
    moments: Moments
    spatial: Moments | None
    features: Float32Array | None
    """[N, D]; None if the file holds moments only: no KID, precision and recall then."""


class RunningMoments:
    """Moments of features that arrive in batches."""

    def __init__(self) -> None:
        self._count = 0
        self._shift: Float64Array | None = None
        self._sum: Any = 0.0
        self._products: Any = 0.0

    def add(self, features: npt.NDArray[np.floating]) -> None:
        """Add features [n, D]."""
        wide = features.astype(np.float64)
        if self._shift is None:
            self._shift = wide.mean(axis=0)  # sums of products of values around 0 lose no digits
        wide = wide - self._shift
        self._count += len(wide)
        self._sum = self._sum + wide.sum(axis=0)
        self._products = self._products + wide.T @ wide

    def result(self) -> Moments:
        """Return the moments of at least two rows."""
        assert self._shift is not None  # noqa: S101  # `add` was called
        mean = self._sum / self._count
        covariance = (self._products - self._count * np.outer(mean, mean)) / (self._count - 1)
        return Moments(self._shift + mean, covariance)


def extract(extractor: Extractor, batches: Iterable[Uint8Array], total: int, label: str) -> FeatureSet:
    """Compute the features of images that arrive in batches [n, H, W, C], with a progress bar.

    Raises:
        EvaluationError: there are fewer than two images, or the network cannot compute them.
    """
    if total < 2:
        raise EvaluationError(f"{label}: at least two images are needed; got {total}")
    features, logits, spatial = [], [], RunningMoments()
    has_spatial = False
    with tqdm(total=total, desc=label, unit="img", dynamic_ncols=True) as bar:
        for batch in batches:
            out = extractor(batch)
            features.append(out.features)
            if out.logits is not None:
                logits.append(out.logits)
            if out.spatial is not None:
                spatial.add(out.spatial)
                has_spatial = True
            bar.update(len(batch))
    return FeatureSet(
        np.concatenate(features), np.concatenate(logits) if logits else None, spatial.result() if has_spatial else None
    )


def cache_folder() -> Path:
    """Return the default folder of cached features, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "iddpm" / "features"


def cached(cache: Path, key: dict[str, Any], compute: Callable[[], FeatureSet]) -> FeatureSet:
    """Return the features stored under a key, or compute and store them.

    Args:
        cache: folder; created if it does not exist.
        key: all that the features depend on; its hash is the name of the file.
        compute: called if there is no file.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache / f"{digest[:32]}.npz"
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)  # damaged
    computed = compute()
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: _write(temporary, computed))
    return computed


def _write(path: Path, found: FeatureSet) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {"features": found.features}
    if found.logits is not None:
        arrays["logits"] = found.logits
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stubs take names for allow_pickle


def _read(path: Path) -> FeatureSet:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        spatial = Moments(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
        return FeatureSet(arrays["features"], arrays.get("logits"), spatial)


def dataset_features(
    path: Path, config: CheckpointConfig, extractor: Extractor, cache: Path, chosen: npt.NDArray[np.int64] | None = None
) -> FeatureSet:
    """Compute the features of a data set, or of chosen images of it, unless they are in the cache."""
    data = open_real(path, config)
    indices = np.arange(len(data.labels)) if chosen is None else chosen
    key = {
        "data": content_of(data),
        "size": [config.model.image_size, config.model.image_channels],
        "options": config.provenance.get("train_config", {}).get("data", {}),
        "images": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
        "features": _content(extractor),
    }

    def batches() -> Iterator[Uint8Array]:
        for start in range(0, len(indices), BATCH):
            yield eight_bit_images(data, indices[start : start + BATCH])

    return cached(cache, key, lambda: extract(extractor, batches(), len(indices), f"features of {path.name}"))


def file_features(path: Path, extractor: Extractor, cache: Path) -> FeatureSet | None:
    """Compute the features of the images `arr_0` of an npz file, unless they are in the cache; None if it has none."""
    stored = stored_images(path)
    if stored is None:
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    key = {"file": digest, "features": _content(extractor)}
    label = f"features of {path.name}"
    return cached(cache, key, lambda: extract(extractor, stored.batches(BATCH), stored.shape[0], label))


def _content(extractor: Extractor) -> dict[str, str]:
    return {name: value for name, value in extractor.description.items() if name != "file"}


def dataset_reference(path: Path, config: CheckpointConfig, extractor: Extractor, cache: Path) -> Reference:
    """Return a data set as reference."""
    found = dataset_features(path, config, extractor, cache)
    described = {"data": path.name, "images": len(found.features)}
    return Reference(described, moments(found.features), found.spatial, found.features)


def file_reference(path: Path, extractor: Extractor, cache: Path) -> Reference:
    """Return a reference file of guided-diffusion: `mu`, `sigma`, `mu_s`, `sigma_s`, images `arr_0`, or both.

    Moments in the file are Inception's: with another network they are used only if the file has no images.

    Raises:
        EvaluationError: the file has neither, or only moments of another network.
    """
    found = file_features(path, extractor, cache)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in arrays}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path} cannot be read as an npz file: {error}") from error
    pooled = _moments(path, held, "mu", "sigma")
    spatial = _moments(path, held, "mu_s", "sigma_s")
    described: dict[str, Any] = {"file": path.name}
    if found is None:
        if pooled is None:
            raise EvaluationError(f"{path} must contain mu and sigma, or images arr_0 (uint8 NHWC)")
        return Reference({**described, "moments": "of the file"}, pooled, spatial, None)
    described["images"] = len(found.features)
    if (
        pooled is not None
        and len(pooled.mean) == found.features.shape[1]
        and extractor.description["kind"] == "inception"
    ):
        return Reference({**described, "moments": "of the file"}, pooled, spatial, found.features)
    return Reference(described, moments(found.features), found.spatial, found.features)


def _moments(path: Path, held: dict[str, npt.NDArray[Any]], mean: str, covariance: str) -> Moments | None:
    if mean not in held or covariance not in held:
        return None
    mu, sigma = held[mean].astype(np.float64), held[covariance].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise EvaluationError(f"{path}: {mean} must be [D] and {covariance} [D, D]; got {mu.shape} and {sigma.shape}")
    return Moments(mu, sigma)
