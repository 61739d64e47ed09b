"""The classifier's folder in checkpoints and in artifacts: valid ones and refused ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffusion.config import CheckpointConfig, DiffusionConfig
from formats.artifact import (
    GRADIENT_FILE,
    INSIDE_CHECKPOINT,
    MANIFEST_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    ArtifactError,
    BandError,
    Manifest,
    NetworkParity,
    file_entry,
    manifest_json,
    read_classifier_artifact,
)
from formats.checkpoint import load_guide
from formats.checkpoint_config import CheckpointError, checkpoint_sha256, read_config
from formats.classifier_folder import CLASSIFIER_FOLDER, find_classifier, misfit
from tests.fakes import (
    CLASS_NAMES,
    tiny_checkpoint,
    tiny_classifier_config,
    tiny_config,
    tiny_guided_checkpoint,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_guided_checkpoint(tmp_path / "tiny")


def guide_of(folder: Path) -> object:
    config = read_config(folder)
    assert isinstance(config, CheckpointConfig)
    return load_guide(folder, config)


def write_artifact(folder: Path, checkpoint: Path, *files: str) -> Path:
    """Write an artifact of files that no runtime reads, with a manifest that matches them."""
    folder.mkdir(parents=True)
    for name in (*files, TIME_MLP_FILE):
        (folder / name).write_bytes(f"{name} of some length".encode())
    band = BandError(t_min=0, t_max=999, prediction=0.0)
    manifest = Manifest(
        checkpoint=read_config(checkpoint),
        checkpoint_sha256=checkpoint_sha256(checkpoint),
        opset=22,
        buckets=(1, 2),
        files={name: file_entry(folder / name) for name in (*files, TIME_MLP_FILE)},
        parity=tuple(
            NetworkParity(backend="openvino 1", precision="fp32", file=name, limit=1e-4, bands=(band,))
            for name in files
        ),
    )
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def artifact(model: Path) -> Path:
    """Return the model's artifact, with its classifier's artifact inside."""
    folder = write_artifact(model / INSIDE_CHECKPOINT, model, MODEL_FILE)
    write_artifact(folder / CLASSIFIER_FOLDER, model / CLASSIFIER_FOLDER, MODEL_FILE, GRADIENT_FILE)
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_size": 16}, "its image_size is 16, the model's is 8"),
        ({"image_channels": 3}, "its image_channels is 3, the model's is 1"),
        ({"num_classes": 5}, "its num_classes is 5, the model's is 4"),
        ({}, None),
    ],
)
def test_a_classifier_must_have_the_model_s_images_and_classes(changes: dict[str, object], problem: str | None) -> None:
    assert misfit(tiny_config(), tiny_classifier_config(**changes)) == problem


def test_a_classifier_must_have_the_network_s_timesteps() -> None:
    model, classifier = tiny_config(), tiny_classifier_config()
    longer = classifier.replace(diffusion=DiffusionConfig(num_timesteps=4000))
    assert misfit(model, longer) == "its range of timesteps is 4000, the model's is 1000"
    rescaled = classifier.replace(diffusion=DiffusionConfig(num_timesteps=4000, rescale_timesteps=True))
    assert misfit(model, rescaled) is None
    # as OpenAI's published 64x64 pair has it
    assert (
        misfit(model, classifier.replace(diffusion=DiffusionConfig(num_timesteps=1000, noise_schedule="linear")))
        is None
    )


def test_classes_must_have_the_same_names_if_both_have_names() -> None:
    model, classifier = tiny_config(), tiny_classifier_config()
    assert misfit(model, classifier.replace(class_names=CLASS_NAMES)) is None
    assert misfit(model, classifier.replace(class_names=CLASS_NAMES[::-1])) == "its class_names are not the model's"


def test_an_unconditional_model_can_be_guided_by_any_classes() -> None:
    assert misfit(tiny_config(num_classes=None, null_class=False), tiny_classifier_config(num_classes=7)) is None


def test_a_model_without_the_folder_has_no_classifier(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "plain")
    assert find_classifier(folder) is None
    assert guide_of(folder) is None


def test_invalid_classifiers_are_refused(model: Path) -> None:
    classifier = model / CLASSIFIER_FOLDER
    assert guide_of(model) is not None
    (classifier / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="holds only a short text"):
        guide_of(model)
    shutil.rmtree(classifier)
    classifier.mkdir()
    with pytest.raises(CheckpointError, match=r"classifier is not a checkpoint folder: it has no config\.json"):
        guide_of(model)
    shutil.rmtree(classifier)
    tiny_checkpoint(classifier)
    with pytest.raises(CheckpointError, match="classifier must hold a checkpoint of kind 'classifier'; got 'unet'"):
        guide_of(model)
    shutil.rmtree(classifier)
    shutil.move(tiny_guided_checkpoint(model.parent / "other") / CLASSIFIER_FOLDER, classifier)
    tiny_checkpoint(model.parent / "rgb", image_channels=3)
    shutil.move(classifier, model.parent / "rgb" / CLASSIFIER_FOLDER)
    with pytest.raises(CheckpointError, match=r"cannot guide the model in .*: its image_channels is 1, the"):
        guide_of(model.parent / "rgb")


def test_an_artifact_s_classifier_is_read_and_checked(artifact: Path) -> None:
    found = read_classifier_artifact(artifact)
    assert found is not None
    assert found[1] == tiny_classifier_config()
    graph = artifact / CLASSIFIER_FOLDER / GRADIENT_FILE
    graph.write_bytes(graph.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"gradient\.onnx does not match manifest\.json"):
        read_classifier_artifact(artifact)
    shutil.rmtree(artifact / CLASSIFIER_FOLDER)
    (artifact / CLASSIFIER_FOLDER).mkdir()
    with pytest.raises(ArtifactError, match="classifier is not an artifact folder"):
        read_classifier_artifact(artifact)


def test_an_artifact_without_the_checkpoint_s_classifier_or_with_another_is_refused(artifact: Path) -> None:
    model = artifact.parent
    shutil.move(artifact / CLASSIFIER_FOLDER, model.parent / "away")
    with pytest.raises(ArtifactError, match=r"was exported without the classifier in .*; export .* again"):
        read_classifier_artifact(artifact)
    shutil.move(model.parent / "away", artifact / CLASSIFIER_FOLDER)
    shutil.move(model / CLASSIFIER_FOLDER, model.parent / "away")
    with pytest.raises(ArtifactError, match=r"was exported with a classifier, and .* has no classifier folder"):
        read_classifier_artifact(artifact)
    weights = model.parent / "away" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.move(model.parent / "away", model / CLASSIFIER_FOLDER)
    with pytest.raises(ArtifactError, match="was exported from another checkpoint"):
        read_classifier_artifact(artifact)


def test_a_classifier_that_does_not_fit_is_refused_in_an_artifact_too(artifact: Path, tmp_path: Path) -> None:
    rgb = tiny_checkpoint(tmp_path / "rgb", image_channels=3)
    alone = write_artifact(tmp_path / "alone", rgb, MODEL_FILE)
    shutil.copytree(artifact / CLASSIFIER_FOLDER, alone / CLASSIFIER_FOLDER)
    with pytest.raises(ArtifactError, match=r"cannot guide the model in .*alone: its image_channels is 1"):
        read_classifier_artifact(alone)
    shutil.rmtree(alone / CLASSIFIER_FOLDER)
    write_artifact(alone / CLASSIFIER_FOLDER, rgb, MODEL_FILE)
    with pytest.raises(ArtifactError, match="must hold the classifier of a UNet; it holds a unet"):
        read_classifier_artifact(alone)
