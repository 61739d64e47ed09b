"""Scores of a set of images against a reference, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.feature_sets import FeatureSet, Reference
from trainer.evaluation.metrics import (
    coverage,
    frechet_distance_of,
    inception_score,
    kernel_distance,
    moments,
    softmax,
)

COLUMNS = {
    "frechet_distance": ("Fréchet distance", ".3f"),
    "spatial_frechet_distance": ("spatial Fréchet distance", ".3f"),
    "inception_score": ("Inception score", ".3f"),
    "kid": ("KID × 1000", ".3f"),
    "precision": ("precision", ".4f"),
    "recall": ("recall", ".4f"),
}
"""Heading and format of each score."""
INCEPTION_NAMES = {"frechet_distance": "FID", "spatial_frechet_distance": "sFID"}
"""What two scores are called if the features are Inception's."""


def score(found: FeatureSet, reference: Reference) -> dict[str, float]:
    """Return the scores of images that their features and the reference allow.

    Raises:
        EvaluationError: the features are of another network than the reference's.
    """
    pooled = moments(found.features)
    if len(pooled.mean) != len(reference.moments.mean):
        raise EvaluationError(
            f"the reference has {len(reference.moments.mean)} features, --features gives {len(pooled.mean)}: they must "
            "be of the same network"
        )
    scores = {"frechet_distance": frechet_distance_of(reference.moments, pooled)}
    if found.spatial is not None and reference.spatial is not None:
        if len(found.spatial.mean) != len(reference.spatial.mean):
            raise EvaluationError(
                f"the reference has {len(reference.spatial.mean)} spatial features, --features gives "
                f"{len(found.spatial.mean)}: they must be of the same network and image size"
            )
        scores["spatial_frechet_distance"] = frechet_distance_of(reference.spatial, found.spatial)
    if found.logits is not None:
        scores["inception_score"] = inception_score(softmax(found.logits))
    if reference.features is not None:
        kid = kernel_distance(reference.features, found.features)
        covered = coverage(reference.features, found.features)
        scores |= {"kid": kid.mean, "kid_std": kid.std, "precision": covered.precision, "recall": covered.recall}
    return scores


def table(rows: Sequence[Mapping[str, Any]], *, inception: bool) -> tuple[list[str], list[list[str]]]:
    """Return heading and cells of a table of scores.

    Args:
        rows: results with `name`, `images` and scores.
        inception: whether the features are Inception's.
    """
    used = [name for name in COLUMNS if any(name in row for row in rows)]
    titles = [INCEPTION_NAMES.get(name, COLUMNS[name][0]) if inception else COLUMNS[name][0] for name in used]
    body = [[str(row["name"]), f"{row['images']:,}", *(_cell(row, name) for name in used)] for row in rows]
    return ["images of", "number", *titles], body


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    if name == "kid":
        return f"{1000 * row['kid']:.3f} ± {1000 * row['kid_std']:.3f}"
    return format(row[name], COLUMNS[name][1])


def markdown(heading: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
