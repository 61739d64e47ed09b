"""Import diffusers folders (a UNet2DModel, or a pipeline with one) as checkpoint folders.

Only JSON and safetensors files are read; diffusers is not needed, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion.config import CheckpointConfig
from formats.checkpoint import read_safetensors, shape_differences, shapes_of
from formats.checkpoint_config import CheckpointError, describe_validation_error
from formats.json_files import read_object
from interchange.diffusers_config import (
    CONFIG_FILE,
    INDEX_FILE,
    OURS_FILE,
    SCHEDULER_FILE,
    WEIGHTS_FILE,
    DoesNotMap,
    SchedulerConfig,
    UNet2DConfig,
    parse_scheduler,
    parse_unet,
    sampling_notes,
    to_diffusion_config,
    to_model_config,
    to_scheduler_config,
    to_unet_config,
)
from interchange.diffusers_weights import expected_weights, from_diffusers, with_current_names
from interchange.import_openai import write_if_sane
from interchange.sanity_check import SanityReport
from interchange.wrapped_names import without_wrappers

NETWORK_FOLDERS = ("unet_ema", "unet")
"""Subfolders that may hold the network; the averaged weights are preferred."""
ANCHOR = "conv_in.weight"
"""A weight that every UNet2DModel has."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class DiffusersFolder:
    """The content of a folder: two configurations and the path of the weights."""

    unet: UNet2DConfig
    scheduler: SchedulerConfig
    names_variance: bool
    """Whether the scheduler specifies a variance: a DDPMScheduler does, a DDIMScheduler does not."""
    weights: Path
    ours: CheckpointConfig | None
    """The configuration that `iddpm export` wrote into the folder, checked against the other two; None: absent."""
    notes: tuple[str, ...] = ()
    """Notes about choices among several possibilities."""


def open_folder(path: Path, scheduler: Path | None = None, network: str | None = None) -> DiffusersFolder:
    """Read the configurations of a diffusers folder, and find its weights.

    Args:
        path: a pipeline's folder (`model_index.json`, `unet/`, `scheduler/`), a UNet2DModel's folder (`config.json`
            and the weights), or both in one, as in the first published pipelines and in folders by `iddpm export`.
        scheduler: the `scheduler_config.json`; None: search the folder, its `scheduler/` and a `scheduler/` beside it.
        network: the subfolder of the network; None: `unet_ema`, the averaged weights of diffusers' training scripts,
            if it exists, else `unet`, else the folder itself.

    Raises:
        CheckpointError: the folder is none of these, its weights are pickled or sharded, it holds another class than
            UNet2DModel or a pipeline with more parts than a network and a scheduler, or it has no scheduler.
    """
    index = path / INDEX_FILE
    if index.is_file():
        _check_index(index)
    unet_folder, notes = _find_network(path, network)
    config_file = unet_folder / CONFIG_FILE
    if not config_file.is_file():
        raise CheckpointError(f"{path} is not a diffusers folder: it has no {CONFIG_FILE} and no unet/{CONFIG_FILE}")
    unet_content = _read_json(config_file)
    if "format_version" in unet_content:
        raise CheckpointError(f"{path} is a checkpoint folder of iddpm already; it needs no import")
    try:
        unet = parse_unet(unet_content)
    except (DoesNotMap, ValidationError) as error:
        raise CheckpointError(f"{config_file}: {_in_words(error)}") from error

    scheduler_file = scheduler or _find_scheduler(path, unet_folder)
    scheduler_content = _read_json(scheduler_file)
    try:
        process = parse_scheduler(scheduler_content)
    except (DoesNotMap, ValidationError) as error:
        raise CheckpointError(f"{scheduler_file}: {_in_words(error)}") from error
    ours = _read_ours(path / OURS_FILE, unet, process) if (path / OURS_FILE).is_file() else None
    names_variance = scheduler_content["_class_name"] == "DDPMScheduler"
    return DiffusersFolder(unet, process, names_variance, _find_weights(unet_folder), ours, notes)


def describe_folder(folder: DiffusersFolder, null_class: bool = False) -> CheckpointConfig:
    """Convert a folder's configurations to a checkpoint's.

    Args:
        folder: from `open_folder`.
        null_class: whether the last of its labels stands for "no label"; folders written by `iddpm export` record this.

    Raises:
        CheckpointError: the network or the process is not supported; one line per field.
    """
    if folder.ours is not None:
        if null_class and not folder.ours.model.null_class:
            raise CheckpointError(f'null_class: {OURS_FILE} says that this network has no label for "no label"')
        return folder.ours
    problems = []
    try:
        model = to_model_config(folder.unet, null_class)
    except (DoesNotMap, ValidationError) as error:
        problems.append(_in_words(error))
    try:
        diffusion = to_diffusion_config(folder.scheduler)
    except (DoesNotMap, ValidationError) as error:
        problems.append(_in_words(error))
    if problems:
        raise CheckpointError("\n".join(problems))

    if model.learn_sigma != diffusion.learns_variance:
        given = f"{folder.scheduler.variance_type!r}" if folder.names_variance else "a DDIMScheduler, which has none"
        raise CheckpointError(
            f"variance_type must be {'learned_range' if model.learn_sigma else 'a fixed kind'} for a network with "
            f"{folder.unet.out_channels} output channels for {folder.unet.in_channels}; got {given}"
        )
    notes = [*folder.notes, *sampling_notes(folder.scheduler)]
    if not folder.names_variance:
        notes.append("a DDIMScheduler specifies no variance; fixed_small is assumed, which equals DDIM with eta = 1")
    return CheckpointConfig(model=model, diffusion=diffusion, provenance={"source": "diffusers", "notes": notes})


def import_folder(
    folder: DiffusersFolder,
    config: CheckpointConfig,
    out: Path,
    allow_failed_check: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> SanityReport:
    """Write a diffusers folder as a checkpoint folder, if its network passes the sanity check.

    Args:
        folder: from `open_folder`.
        config: from `describe_folder`; class names may be added.
        out: the checkpoint folder to write.
        allow_failed_check: write the folder even if the sanity check fails.
        notify: called with each note.

    Returns:
        The result of the sanity check; the folder was written if it passed or `allow_failed_check` is set.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the configuration; nothing is written.
    """
    plain, taken = without_wrappers(read_safetensors(folder.weights), ANCHOR)
    if notes := [f"{prefix!r} was removed from the names of weights" for prefix in taken]:
        for note in notes:
            notify(note)
        notes = [*config.provenance.get("notes", []), *notes]
        config = config.replace(provenance={**config.provenance, "notes": notes})
    theirs = with_current_names(plain)
    if problems := shape_differences(shapes_of(expected_weights(config.model)), shapes_of(theirs)):
        raise CheckpointError(f"{folder.weights} does not fit {CONFIG_FILE}: {'; '.join(problems)}")
    try:
        weights = from_diffusers(theirs, config.model, folder.unet.flip_sin_to_cos)
    except ValueError as error:
        raise CheckpointError(f"{folder.weights}: {error}") from error
    return write_if_sane(folder.weights, config, weights, out, allow_failed_check)


def _check_index(index: Path) -> None:
    """Check that a pipeline consists of a network and a scheduler: a latent pipeline, for example, has a decoder."""
    parts = {name: part for name, part in _read_json(index).items() if not name.startswith("_") and part}
    if more := sorted(parts.keys() - {"unet", "scheduler"}):
        raise CheckpointError(
            f"{index}: the pipeline must have a network and a scheduler only; it also has {', '.join(more)}, so its "
            "network does not work on pixels alone"
        )


def _find_network(path: Path, named: str | None) -> tuple[Path, tuple[str, ...]]:
    """Return the folder of the network, and notes about the choice."""
    found = [name for name in NETWORK_FOLDERS if (path / name / CONFIG_FILE).is_file()]
    if named is not None:
        if not (path / named / CONFIG_FILE).is_file():
            there = f"; the folder has {' and '.join(found)}" if found else ""
            raise CheckpointError(f"{path / named} has no {CONFIG_FILE} of a network{there}")
        return path / named, ()
    if not found:
        return path, ()
    if len(found) > 1:
        return path / found[0], (f"using {found[0]}, the averaged weights; --unet {found[1]} selects the others",)
    return path / found[0], ()


def _find_scheduler(path: Path, unet_folder: Path) -> Path:
    places = (path, path / "scheduler", unet_folder, unet_folder.resolve().parent / "scheduler")
    for place in places:
        if (place / SCHEDULER_FILE).is_file():
            return place / SCHEDULER_FILE
    raise CheckpointError(
        f"{path} has no {SCHEDULER_FILE}, which describes the process that the network was trained for: give the file "
        f"with --scheduler, or save the training's scheduler into the folder: scheduler.save_pretrained({str(path)!r})"
    )


def _find_weights(folder: Path) -> Path:
    weights = folder / WEIGHTS_FILE
    if weights.is_file():
        return weights
    if pickles := sorted(found.name for pattern in PICKLES for found in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has {', '.join(pickles)} instead of {WEIGHTS_FILE}: pickles can run code when opened, so "
            f"they are not read. If you trust the file, UNet2DModel.from_pretrained({str(folder)!r})"
            ".save_pretrained(NEW_FOLDER) writes safetensors; add the scheduler's file"
        )
    others = sorted(found.name for found in folder.glob("*.safetensors*"))
    hint = f" (it has {', '.join(others)}: load it with diffusers and save it as a single file)" if others else ""
    raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}{hint}")


def _read_ours(path: Path, unet: UNet2DConfig, scheduler: SchedulerConfig) -> CheckpointConfig:
    try:
        ours = CheckpointConfig.model_validate(_read_json(path))
        agrees = (to_unet_config(ours.model), to_scheduler_config(ours.diffusion)) == (unet, scheduler)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_in_words(error)}") from error
    except DoesNotMap:
        agrees = False
    if not agrees:
        raise CheckpointError(
            f"{path} does not agree with {CONFIG_FILE} and {SCHEDULER_FILE}, which were changed after the export; "
            f"delete {path.name} to import the changed configuration"
        )
    return ours


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _in_words(error: DoesNotMap | ValidationError) -> str:
    return describe_validation_error(error) if isinstance(error, ValidationError) else str(error)
