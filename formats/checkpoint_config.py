"""Read a checkpoint folder's `config.json` and compute its hash, without building the network and without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from formats.json_files import read_object

AnyCheckpointConfig = CheckpointConfig | ClassifierCheckpointConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1
KINDS: dict[str, type[CheckpointConfig] | type[ClassifierCheckpointConfig]] = {
    "unet": CheckpointConfig,
    "classifier": ClassifierCheckpointConfig,
}


class CheckpointError(ValueError):
    """A checkpoint folder cannot be written or read; the message names the file, the field and the rule."""


def read_config(folder: Path) -> AnyCheckpointConfig:
    """Read `config.json` of a checkpoint folder.

    Raises:
        CheckpointError: the file is missing or not JSON, has another format version or an unknown kind, or a field is
            missing, unknown or out of range; the message names the file and the field.
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
        return read_object(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = path.parent / "model"  # of a training run
        hint = f"; {inside} is one" if (inside / CONFIG_FILE).is_file() else ""
        raise CheckpointError(f"{path.parent} is not a checkpoint folder: it has no {path.name}{hint}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def describe_validation_error(error: ValidationError) -> str:
    """Return one line that names the invalid fields of a configuration and the reasons."""
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        got = "" if problem["type"] in ("value_error", "missing") else f" (got {problem['input']!r})"
        problems.append(f"{field}: {message}{got}" if field else f"{message}{got}")
    return "; ".join(problems)


def config_json(config: AnyCheckpointConfig) -> str:
    """Return the text of a `config.json`.

    Raises:
        CheckpointError: JSON cannot hold the configuration.
    """
    try:
        return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (PydanticSerializationError, ValueError) as error:
        raise CheckpointError(f"{CONFIG_FILE}: the configuration cannot be written as JSON: {error}") from error


def checkpoint_sha256(folder: Path) -> str:
    """Return a hash of what determines a checkpoint's pixels: its weights file, and its model and diffusion fields.

    Class names, provenance and sampling defaults are not included. Fields at their defaults are not included either:
    a field added to the format later, whose default keeps the earlier behaviour, does not change the hash.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    config = read_config(folder)
    described = config.model_dump(mode="json", include={"model", "diffusion"}, exclude_defaults=True)
    canonical = json.dumps({"kind": config.kind, **described}, sort_keys=True, separators=(",", ":"))
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            weights_hash = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {WEIGHTS_FILE}") from error
    return hashlib.sha256(f"{canonical}\n{weights_hash}".encode()).hexdigest()
