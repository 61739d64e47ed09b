"""The checkpoint folder: `config.json` says what the network is, `model.safetensors` holds its float32 EMA weights.

A folder appears whole or not at all: it is written under a temporary name, fsynced and renamed, `config.json` last,
so that nothing half-written can be read. Reading never runs code from a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.classifier import Classifier
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.unet import UNet

AnyCheckpointConfig = CheckpointConfig | ClassifierCheckpointConfig
Shapes = Mapping[str, tuple[int, ...]]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1
KINDS: dict[str, type[CheckpointConfig] | type[ClassifierCheckpointConfig]] = {
    "unet": CheckpointConfig,
    "classifier": ClassifierCheckpointConfig,
}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be written or read; the message names the file, the field and the rule."""


def build_network(config: AnyCheckpointConfig) -> UNet | Classifier:
    """Build the network of a checkpoint on the current default device, with untrained weights."""
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
    """Write a checkpoint folder atomically; a checkpoint that is already there is replaced.

    Everything goes to a hidden sibling folder first, is fsynced, and takes the name in one rename. An old checkpoint
    of that name is moved aside just before and deleted just after. If anything fails, the old one is still there
    and the temporary folder is gone; if the process is killed, a folder named `.NAME.*` may be left over.

    Args:
        folder: where the checkpoint shall be; missing parents are made.
        config: what `config.json` will say.
        weights: the network's state dict, on any device; stored in float32.
        extra: called with the temporary folder before the rename, to add files (the trainer's `state/`).

    Raises:
        CheckpointError: weights that do not fit the configuration, a configuration JSON cannot hold, or a target
            that exists and is no checkpoint. Nothing has been written then.
    """
    folder = folder.resolve()
    text = _config_json(config)
    if problems := shape_differences(expected_shapes(config), shapes_of(weights)):
        raise CheckpointError(f"{folder}: weights do not fit the configuration: {'; '.join(problems)}")
    if folder.exists() and not _may_replace(folder):
        raise CheckpointError(f"{folder} exists and is no checkpoint folder (no {CONFIG_FILE}); it was left alone")

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        save_file({name: _plain(tensor) for name, tensor in weights.items()}, temporary / WEIGHTS_FILE)
        if extra is not None:
            extra(temporary)
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        # safetensors makes its file readable for its owner only; a service may run as somebody else
        (temporary / WEIGHTS_FILE).chmod((temporary / CONFIG_FILE).stat().st_mode)
        _sync_tree(temporary)
        _rename_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _config_json(config: AnyCheckpointConfig) -> str:
    try:
        return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (PydanticSerializationError, ValueError) as error:
        raise CheckpointError(f"{CONFIG_FILE}: the configuration cannot be written as JSON: {error}") from error


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _may_replace(folder: Path) -> bool:
    return folder.is_dir() and ((folder / CONFIG_FILE).is_file() or not any(folder.iterdir()))


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_into_place(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}") if folder.exists() else None
    if old is not None:
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def read_config(folder: Path) -> AnyCheckpointConfig:
    """Read `config.json` of a checkpoint folder.

    Raises:
        CheckpointError: no such file, not JSON, another format version, an unknown kind, or a field that is missing,
            unknown or out of range; the message names the file and the field.
    """
    path = folder / CONFIG_FILE
    content = _read_object(path)
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}; got {version!r}")
    kind = content.get("kind", "unet")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{path}: kind must be one of {sorted(KINDS)}; got {kind!r}")
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {describe_validation_error(error)}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path.parent} is no checkpoint folder: it has no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def describe_validation_error(error: ValidationError) -> str:
    """Say which fields of a configuration are wrong, and why, in one line."""
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        got = "" if problem["type"] in ("value_error", "missing") else f" (got {problem['input']!r})"
        problems.append(f"{field}: {message}{got}" if field else f"{message}{got}")
    return "; ".join(problems)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read `model.safetensors` of a checkpoint folder: float32 tensors on the CPU, by name.

    Raises:
        CheckpointError: no such file, a truncated or damaged one, or a tensor that is not floating point.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no {path.name}")
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: float32 tensors on the CPU, by name.

    Raises:
        CheckpointError: a truncated or damaged file, one that cannot be read, or a tensor that is not floating point.
    """
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated, no safetensors file, or not readable by this user: {error}"
        ) from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} must be floating point; got {tensor.dtype}")
    # A copy of its own memory: the file is mapped, and its tensors are aligned to 8 bytes only.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}


def load_unet(folder: Path) -> tuple[CheckpointConfig, UNet]:
    """Rebuild the UNet of a checkpoint folder: on the CPU, in eval mode, without gradients.

    Raises:
        CheckpointError: a folder that cannot be read, that holds a classifier, or whose weights do not fit.
    """
    config = read_config(folder)
    if not isinstance(config, CheckpointConfig):
        raise CheckpointError(f"{folder} holds a {config.kind}; a checkpoint of kind 'unet' is needed here")
    with torch.device("meta"):
        network = UNet(config.model)
    _load(network, folder)
    return config, network


def load_classifier(folder: Path) -> tuple[ClassifierCheckpointConfig, Classifier]:
    """Rebuild the classifier of a checkpoint folder: on the CPU, in eval mode, without gradients for its weights.

    Raises:
        CheckpointError: a folder that cannot be read, that holds a UNet, or whose weights do not fit.
    """
    config = read_config(folder)
    if not isinstance(config, ClassifierCheckpointConfig):
        raise CheckpointError(f"{folder} holds a {config.kind}; a checkpoint of kind 'classifier' is needed here")
    with torch.device("meta"):
        network = Classifier(config.model)
    _load(network, folder)
    return config, network


def _load(network: UNet | Classifier, folder: Path) -> None:
    weights = read_weights(folder)
    if problems := shape_differences(shapes_of(network.state_dict()), shapes_of(weights)):
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {'; '.join(problems)}")
    network.load_state_dict(weights, strict=True, assign=True)
    network.eval().requires_grad_(False)


def shape_differences(expected: Shapes, found: Shapes) -> list[str]:
    """Summarise how weights differ from what a network needs, in at most three phrases; empty where they fit."""
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


def checkpoint_sha256(folder: Path) -> str:
    """Hash what determines a checkpoint's pictures: its weights file, and model and diffusion of its configuration.

    Class names, provenance and sampling defaults do not count, nor do fields at their defaults (so that a field
    added to the format later, whose default means what was so before, changes no hash).

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: a folder that cannot be read.
    """
    config = read_config(folder)
    described = config.model_dump(mode="json", include={"model", "diffusion"}, exclude_defaults=True)
    canonical = json.dumps({"kind": config.kind, **described}, sort_keys=True, separators=(",", ":"))
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            weights_hash = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no {WEIGHTS_FILE}") from error
    return hashlib.sha256(f"{canonical}\n{weights_hash}".encode()).hexdigest()
