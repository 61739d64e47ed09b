"""Open an artifact folder for serving: check it, and return what the artifact backends read from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.time_mlp import TimeMLP
from formats.artifact import (
    GRADIENT_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    ArtifactError,
    Manifest,
    find_artifact,
    read_artifact,
    read_classifier_artifact,
)
from formats.classifier_folder import CLASSIFIER_FOLDER
from formats.precision import Precision
from service.backends.processor import vector_instructions
from service.cpus import available_cpus
from service.errors import ModelError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ArtifactGraph:
    """A graph of an artifact with its manifest and time MLP."""

    graph: Path
    manifest: Manifest
    time_mlp: TimeMLP

    def feed(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays by the names of the graph's inputs."""
        return {name: array for name, array in inputs._asdict().items() if array is not None}


@dataclass(frozen=True)
class ArtifactClassifier(ArtifactGraph):
    """The gradient graph of the classifier in an artifact folder."""

    config: ClassifierCheckpointConfig


@dataclass(frozen=True)
class ArtifactModel(ArtifactGraph):
    """The model in an artifact folder, with its classifier if it has one."""

    config: CheckpointConfig
    classifier: ArtifactClassifier | None

    def network_id(self, description: str) -> str:
        """Return a hash of what pixels depend on: graphs, runtime and its configuration, and processor."""
        hashes = _hashes(self.manifest) + ([] if self.classifier is None else _hashes(self.classifier.manifest))
        return hashlib.sha256("\n".join([*hashes, description, *vector_instructions()]).encode()).hexdigest()[:16]


def _hashes(manifest: Manifest) -> list[str]:
    # The checkpoint's hash covers its configuration too, but can be verified only if the checkpoint is present
    config = json.dumps(manifest.checkpoint.model_dump(mode="json", include={"model", "diffusion"}), sort_keys=True)
    return [
        manifest.checkpoint_sha256,
        config,
        *(f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items())),
    ]


def open_artifact(folder: Path, backend: str) -> ArtifactModel:
    """Open a model folder's artifact: the folder itself, or `artifact` in a checkpoint folder.

    Raises:
        ModelError: there is no artifact, or it is damaged, of an unknown format or not servable.
    """
    found = find_artifact(folder)
    if found is None:
        raise ModelError(
            f"backend '{backend}' serves exported artifacts, and {folder} has none: "
            f"iddpm export {folder} {folder / 'artifact'} (or serve the checkpoint with backend 'torch')"
        )
    try:
        manifest = read_artifact(found)
        time_mlp = TimeMLP.read(found / TIME_MLP_FILE)
        classifier = _classifier(found)
    except (ArtifactError, ValueError) as error:
        raise ModelError(str(error)) from error
    config = manifest.checkpoint
    if not isinstance(config, CheckpointConfig):
        raise ModelError(f"{found} holds a classifier, which guides a model and makes no images of its own")
    return ArtifactModel(found / MODEL_FILE, manifest, time_mlp, config, classifier)


def refuse_unfit_parity(opened: ArtifactGraph, runtime: str, precision: Precision) -> None:
    """Check that the results were compared with PyTorch's at export and are within the limit.

    Raises:
        ModelError: the manifest has no parity measurement, or its error exceeds the limit.
    """
    measured = opened.manifest.parity_of(runtime, precision, opened.graph.name)
    if measured is None:
        reason = opened.manifest.reason_not_measured(runtime, precision, opened.graph.name)
        cure = f"on a processor with {precision}, or use fp32" if precision == "bf16" else "with --precision fp32"
        raise ModelError(
            f"{opened.graph.parent}: the manifest has no parity of {runtime} in {precision}"
            f"{'' if reason is None else f' (where it was exported, {reason})'}; export the checkpoint again, {cure}"
        )
    if not measured.passed:
        raise ModelError(
            f"{opened.graph.parent}: {runtime} in {precision} is too far from PyTorch for this network: relative error "
            f"{measured.worst:.1e}, at most {measured.limit:.0e} is allowed"
        )


def _classifier(artifact: Path) -> ArtifactClassifier | None:
    found = read_classifier_artifact(artifact)
    if found is None:
        return None
    manifest, config = found
    folder = artifact / CLASSIFIER_FOLDER
    return ArtifactClassifier(folder / GRADIENT_FILE, manifest, TimeMLP.read(folder / TIME_MLP_FILE), config)


def cpu_threads(wanted: int | None) -> int:
    """Return the number of threads of a network call: the configured one, or one per usable core."""
    return available_cpus().usable if wanted is None else wanted


def refuse_unfit_options(backend: str, device: str, torch_compile: bool) -> None:
    """Check options that runtimes on the CPU do not support.

    Raises:
        ModelError: the device is not a CPU, or `torch_compile` is set.
    """
    if device not in ("auto", "cpu"):
        raise ModelError(f"backend '{backend}' runs on the CPU; device must be auto or cpu; got '{device}'")
    if torch_compile:
        raise ModelError(f"torch_compile is for backend 'torch'; backend '{backend}' compiles by itself")
