"""The checkpoint folder: `config.json` describes the network, `model.safetensors` holds its float32 EMA weights.

Folders are written atomically (`formats.atomic_folder`). Reading never runs code from a file. To read `config.json` or
the hash without torch, use `formats.checkpoint_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.classifier import Classifier
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.unet import UNet
from formats.atomic_folder import may_replace, write_folder
from formats.checkpoint_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AnyCheckpointConfig,
    CheckpointError,
    config_json,
    read_config,
)
from formats.classifier_folder import find_classifier, misfit
from formats.file_content import describe_wrong_content

Shapes = Mapping[str, tuple[int, ...]]


def build_network(config: AnyCheckpointConfig) -> UNet | Classifier:
    """Build the network of a configuration on the default device, with untrained weights."""
    if isinstance(config, CheckpointConfig):
        return UNet(config.model)
    return Classifier(config.model)


def expected_shapes(config: AnyCheckpointConfig) -> Shapes:
    """Return the name and shape of every weight that a checkpoint of this configuration holds."""
    with torch.device("meta"):
        network = build_network(config)
    return shapes_of(network.state_dict())


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of every weight, by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def write_checkpoint(
    folder: Path,
    config: AnyCheckpointConfig,
    weights: Mapping[str, Tensor],
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder atomically (`write_folder`), replacing an existing checkpoint.

    Args:
        folder: the folder to write; missing parents are created.
        config: the content of `config.json`.
        weights: the network's state dict, on any device; stored in float32.
        extra: called with the temporary folder before the rename, to add files (the trainer's `state/`).

    Raises:
        CheckpointError: the weights do not fit the configuration, JSON cannot hold the configuration, or the target
            exists and is not a checkpoint. Nothing is written in these cases.
        OSError: as for `write_folder`.
    """
    folder = folder.resolve()
    text = config_json(config)
    if problems := shape_differences(expected_shapes(config), shapes_of(weights)):
        raise CheckpointError(f"{folder}: weights do not fit the configuration: {'; '.join(problems)}")
    if not may_replace(folder, CONFIG_FILE, ("model", "diffusion")):
        raise CheckpointError(f"{folder} exists and is not a checkpoint folder; it was not changed")

    def write(temporary: Path) -> None:
        save_file({name: _plain(tensor) for name, tensor in weights.items()}, temporary / WEIGHTS_FILE)
        if extra is not None:
            extra(temporary)
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        # safetensors makes its file readable by its owner only; a service may run as another user
        (temporary / WEIGHTS_FILE).chmod((temporary / CONFIG_FILE).stat().st_mode)

    write_folder(folder, write)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read `model.safetensors` of a checkpoint folder: float32 tensors on the CPU, by name.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or holds a tensor that is not floating point.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {path.name}")
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: float32 tensors on the CPU, by name.

    Raises:
        CheckpointError: the file is truncated, damaged or unreadable, or holds a tensor that is not floating point.
    """
    try:
        if problem := describe_wrong_content(path):
            raise CheckpointError(f"{path} {problem}")
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or not readable by this user: {error}") from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} must be floating point; got {tensor.dtype}")
    # Copy: tensors of the mapped file are aligned to 8 bytes only.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}


def load_unet(folder: Path) -> tuple[CheckpointConfig, UNet]:
    """Rebuild the UNet of a checkpoint folder: on the CPU, in eval mode, without gradients.

    Raises:
        CheckpointError: the folder cannot be read or holds a classifier, or its weights do not fit.
    """
    config = read_config(folder)
    if not isinstance(config, CheckpointConfig):
        raise CheckpointError(f"{folder} must hold a checkpoint of kind 'unet'; got {config.kind!r}")
    with torch.device("meta"):
        network = UNet(config.model)
    _load(network, folder)
    return config, network


def load_classifier(folder: Path) -> tuple[ClassifierCheckpointConfig, Classifier]:
    """Rebuild the classifier of a checkpoint folder: on the CPU, in eval mode, without gradients for its weights.

    Raises:
        CheckpointError: the folder cannot be read or holds a UNet, or its weights do not fit.
    """
    config = read_config(folder)
    if not isinstance(config, ClassifierCheckpointConfig):
        raise CheckpointError(f"{folder} must hold a checkpoint of kind 'classifier'; got {config.kind!r}")
    with torch.device("meta"):
        network = Classifier(config.model)
    _load(network, folder)
    return config, network


def load_guide(folder: Path, model: CheckpointConfig) -> tuple[ClassifierCheckpointConfig, Classifier] | None:
    """Rebuild the classifier that guides a checkpoint's model, as `load_classifier`; return None if there is none.

    Raises:
        CheckpointError: as `load_classifier`; also if the classifier does not fit the model.
    """
    found = find_classifier(folder)
    if found is None:
        return None
    config, classifier = load_classifier(found)
    if problem := misfit(model, config):
        raise CheckpointError(f"{found} cannot guide the model in {folder}: {problem}")
    return config, classifier


def _load(network: UNet | Classifier, folder: Path) -> None:
    weights = read_weights(folder)
    if problems := shape_differences(shapes_of(network.state_dict()), shapes_of(weights)):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {'; '.join(problems)}")
    network.load_state_dict(weights, strict=True, assign=True)
    network.eval().requires_grad_(False)


def shape_differences(expected: Shapes, found: Shapes) -> list[str]:
    """Summarise how weights differ from those of a network, in at most three phrases; empty if they fit."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    groups = (("missing", missing), ("not expected", unexpected), ("of another shape", reshaped))
    return [f"{len(names)} {what} ({_some(names)})" for what, names in groups if names]


def _some(names: list[str], limit: int = 2) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
