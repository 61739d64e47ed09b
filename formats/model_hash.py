"""The hash that names a model, whichever files of it there are."""

from __future__ import annotations

from pathlib import Path

from formats.artifact import find_artifact, read_artifact
from formats.checkpoint_config import CONFIG_FILE, checkpoint_sha256
from formats.ensemble import is_ensemble, read_ensemble


def model_sha256(folder: Path) -> str:
    """Return the hash of the checkpoint in a model folder, of the one that an artifact was exported from, or of an
    ensemble.

    Raises:
        CheckpointError, ArtifactError, EnsembleError: the folder cannot be read.
    """
    if is_ensemble(folder):
        return read_ensemble(folder).sha256
    if not (folder / CONFIG_FILE).is_file() and (artifact := find_artifact(folder)) is not None:
        return read_artifact(artifact).checkpoint_sha256
    return checkpoint_sha256(folder)
