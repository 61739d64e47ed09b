"""Score generated images and write the results: results.json, results.md and grid.png beside samples.npz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.config import CheckpointConfig
from formats.atomic_file import write_file
from formats.images import Uint8Array, captioned_rows, encode
from formats.shards import SAMPLES_FILE
from trainer.data import eight_bit_images
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.extractors import Extractor
from trainer.evaluation.feature_sets import (
    dataset_features,
    dataset_reference,
    file_features,
    file_reference,
)
from trainer.evaluation.reading import open_real
from trainer.evaluation.sample_files import stored_images
from trainer.evaluation.scores import markdown, score, table
from trainer.provenance import git_commit

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
GRID_FILE = "grid.png"
GRID_IMAGES = 100


def refuse_unfit(config: CheckpointConfig, *, data: Path | None, split_baseline: Path | None) -> None:
    """Check that real images can be compared with generated ones, before any is generated.

    Raises:
        EvaluationError: there are too few.
        DataError: a data set cannot be read, or its images do not have 8 bits.
    """
    for option, path in (("--data", data), ("--split-baseline", split_baseline)):
        if path is None:
            continue
        real = open_real(path, config)
        eight_bit_images(real, np.zeros(1, np.int64))
        if len(real.labels) < 2:
            raise EvaluationError(f"{option} {path} must have at least two images; it has {len(real.labels)}")


def evaluate_samples(
    out: Path,
    config: CheckpointConfig,
    extractor: Extractor,
    *,
    data: Path | None,
    reference: Path | None,
    split_baseline: Path | None,
    cache: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Score `out/samples.npz` and write the results beside it.

    Args:
        out: the folder.
        config: of the model that generated the images; `refuse_unfit` has accepted the data for it.
        extractor: computes the features.
        data: data set to compare with, unless `reference` is given.
        reference: npz file of guided-diffusion's evaluator to compare with.
        split_baseline: data set from which as many images are scored in the same way.
        cache: folder of features of real images.
        facts: stored with the results: the command, the model.

    Returns:
        The content of results.json.

    Raises:
        EvaluationError: the network, the reference or the images do not fit.
        DataError: a data set cannot be read.
    """
    if reference is not None:
        against = file_reference(reference, extractor, cache)
    else:
        assert data is not None  # noqa: S101  # the caller passes one of the two
        against = dataset_reference(data, config, extractor, cache)
    found = file_features(out / SAMPLES_FILE, extractor, out / "features")
    assert found is not None  # noqa: S101  # the file has images
    count = len(found.features)
    rows: list[dict[str, Any]] = [{"name": "the model", "images": count, **score(found, against)}]
    if split_baseline is not None:
        available = len(open_real(split_baseline, config).labels)
        chosen = np.sort(np.random.default_rng(0).permutation(available)[:count])
        real = dataset_features(split_baseline, config, extractor, cache, chosen)
        name = f"real split {split_baseline.name}"
        rows.append({"name": name, "images": len(real.features), **score(real, against)})
    results = {
        "kind": "samples",
        **facts,
        "images_seen": config.provenance.get("images_seen"),
        "commit": git_commit(),
        "features": extractor.description,
        "reference": against.description,
        "results": rows,
    }
    write_file(out / RESULTS_FILE, f"{json.dumps(results, indent=2)}\n".encode())
    write_file(out / TABLE_FILE, _page(results).encode())
    write_file(out / GRID_FILE, sample_grid(out / SAMPLES_FILE, config))
    return results


def _page(results: dict[str, Any]) -> str:
    heading, body = table(results["results"], inception=results["features"]["kind"] == "inception")
    reference = ", ".join(f"{name} {value}" for name, value in results["reference"].items())
    return (
        f"{markdown(heading, body)}\n"
        f"Reference: {reference}. Features: {results['features']['kind']}, {results['features']['file']}, "
        f"sha256 {results['features']['sha256'][:12]}.\n\n```\n{results['command']}\n```\n"
    )


def sample_grid(path: Path, config: CheckpointConfig) -> bytes:
    """Return a PNG file with the first images of samples.npz, one row per class."""
    stored = stored_images(path)
    assert stored is not None  # noqa: S101  # the file has images
    images = next(stored.batches(min(stored.shape[0], 1000)))
    rows: list[tuple[str, Uint8Array]]
    with np.load(path, allow_pickle=False) as arrays:
        labels = arrays["arr_1"][: len(images)] if "arr_1" in arrays else None
    if labels is None:
        shown = images[:GRID_IMAGES]
        rows = [("", shown[start : start + 10]) for start in range(0, len(shown), 10)]
    else:
        classes = np.unique(labels)[:10]
        names = config.class_names or tuple(map(str, range(int(labels.max()) + 1)))
        rows = [(names[label], images[labels == label][:10]) for label in classes]
    picture = np.asarray(captioned_rows(rows, scale=2 if stored.shape[1] <= 64 else 1))
    return encode(picture)
