"""Import OpenAI's `.pt` files (improved-diffusion, guided-diffusion) as checkpoint folders.

Reading such a file never runs code from it. Errors name the flags that the network was trained with, because the user
gives the configuration as flags.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.config import CheckpointConfig
from formats.checkpoint import read_safetensors, shapes_of, write_checkpoint
from formats.checkpoint_config import AnyCheckpointConfig, CheckpointError
from formats.file_content import damaged_part, describe_wrong_content, safetensors_size
from interchange.openai_shapes import ANCHOR, channels_to_infer, describe_mismatch
from interchange.sanity_check import SanityReport, check_predictions
from interchange.wrapped_names import without_wrappers


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights of a `.pt` or `.safetensors` file: float32 tensors on the CPU, by name.

    Only tensors and plain containers are unpickled (`torch.load(weights_only=True)`); no option changes this.

    Raises:
        CheckpointError: the file cannot be read, is damaged, needs to run code, or holds something else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        if problem := describe_wrong_content(path):
            raise CheckpointError(f"{path} {problem}")
        if safetensors_size(path) is not None:
            return read_safetensors(path)
        if zipfile.is_zipfile(path) and (part := damaged_part(path)):
            raise CheckpointError(f"{path} is damaged: the checksum of {part} is wrong; copy or download it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the errors handled here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, str(error))) from error
    except Exception as error:  # a damaged pickle may raise anything: KeyError, EOFError, RuntimeError, ...
        raise CheckpointError(f"{path} is damaged, or not a file of torch.save: {_first_sentence(error)}") from error
    return _checked_weights(path, content)


def _refused(path: Path, message: str) -> str:
    wanted = re.search(r"GLOBAL (\S+)", message)
    if wanted is None:
        return f"{path} is damaged, or not a file of torch.save"
    return (
        f"{path} needs to run code to be loaded ({wanted.group(1)}), so it was not loaded. The files of OpenAI and of "
        "its training scripts hold tensors only. If you trust the file, load it with the program that wrote it and "
        "save only the tensors: torch.save({name: tensor, ...}, path)"
    )


def _first_sentence(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__} {text.splitlines()[0].split('. ')[0]}" if text else type(error).__name__


def _checked_weights(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a state dict; got a {type(content).__name__}")
    if {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path} holds the state of an optimizer (opt*.pt); import the weights, ema_*.pt")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} must hold a state dict of names and tensors; {name!r} is a {type(value).__name__}. "
                "If the file wraps the state dict, save the inner state dict alone"
            )
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {name} must be floating point; got {value.dtype}")
    return {name: value.detach().to(torch.float32).contiguous() for name, value in content.items()}


def import_checkpoint(
    path: Path,
    config: AnyCheckpointConfig,
    out: Path,
    allow_failed_check: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> SanityReport:
    """Write a `.pt` file as a checkpoint folder, if its network passes the sanity check.

    Prefixes of wrappers are removed from the names of weights. If no flag gives the number of image channels, it is
    read from the weights. The provenance notes both.

    Args:
        path: the `.pt` file.
        config: the network and its process (from `PUBLISHED`, or `config_from_flags`).
        out: the checkpoint folder to write.
        allow_failed_check: write the folder even if the sanity check fails.
        notify: called with each note.

    Returns:
        The result of the sanity check; the folder was written if it passed or `allow_failed_check` is set.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit the configuration; nothing is written.
    """
    weights, taken = without_wrappers(load_state_dict(path), ANCHOR)
    notes = [f"{prefix!r} was removed from the names of weights" for prefix in taken]
    if (channels := channels_to_infer(config, shapes_of(weights))) is not None:
        config = config.replace(model={**config.model.model_dump(), "image_channels": channels})
        notes.append(f"image_channels: {channels}, read from the weights")
    for note in notes:
        notify(note)
    config = config.replace(provenance={**config.provenance, "notes": [*config.provenance.get("notes", []), *notes]})
    if problems := describe_mismatch(config, shapes_of(weights)):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"{path} does not fit the configuration:{lines}")
    return write_if_sane(path, config, weights, out, allow_failed_check)


def write_if_sane(
    path: Path, config: AnyCheckpointConfig, weights: dict[str, Tensor], out: Path, allow_failed_check: bool
) -> SanityReport:
    """Write imported weights as a checkpoint folder, if their network passes the sanity check.

    Args:
        path: the file that the weights were read from, for the provenance and for errors.
        config: the network and its process; the weights must fit.
        weights: float32 tensors on the CPU, by our names.
        out: the checkpoint folder to write.
        allow_failed_check: write the folder even if the sanity check fails.

    Returns:
        The result of the sanity check; the folder was written if it passed or `allow_failed_check` is set.

    Raises:
        CheckpointError: a weight is not finite; nothing is written.
    """
    if damaged := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{path}: {len(damaged)} of {len(weights)} tensors hold NaN or infinity ({damaged[0]})")

    report = SanityReport(None, True, "Classifiers are not checked: the expected output is not known.")
    if isinstance(config, CheckpointConfig):
        report = check_predictions(config, weights)

    if report.passed or allow_failed_check:
        provenance = {
            **config.provenance,
            "file": path.name,
            "file_sha256": _sha256(path),
            "sanity_check": report.advice if report.passed else f"FAILED, imported anyway: {report.advice}",
        }
        write_checkpoint(out, config.replace(provenance=provenance), weights)
    return report


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
