"""Check that a run can resume from its newest checkpoint: configuration, data and state."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from formats.checkpoint_config import AnyCheckpointConfig, CheckpointError, describe_validation_error, read_config
from trainer import state as train_state
from trainer.config import MAY_CHANGE_ON_RESUME, TrainConfig
from trainer.data import Dataset
from trainer.errors import TrainError
from trainer.run_folder import checkpoints, newest_checkpoint
from trainer.state import SavedState

NAMES_OF_DATA = ("file", "folder", "dataset")
"""Entries of a data set's description that name it and do not describe its content."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint from which a run resumes."""

    folder: Path
    """Folder of the checkpoint."""
    earlier: list[dict[str, Any]]
    """Changes of each earlier resume."""
    changes: dict[str, Any] | None
    """Changes of this resume, for the provenance of later checkpoints; None: no change."""

    @property
    def description(self) -> str:
        """Changes of this resume, as text to append to a message."""
        changed = {} if self.changes is None else self.changes.get("changed", {})
        words = [f"{name} {old} -> {new}" for name, (old, new) in changed.items()]
        names = {"data_before": "the data", "validation_data_before": "the data for validation"}
        words += [what for name, what in names.items() if name in (self.changes or {})]
        return f"; changed: {', '.join(words)}" if words else ""

    @property
    def history(self) -> list[dict[str, Any]]:
        """Changes of every resume so far."""
        return [*self.earlier, *([] if self.changes is None else [self.changes])]


def resumed_config(run: Path, preset: str) -> TrainConfig:
    """Return the configuration that a run was trained with up to its newest checkpoint.

    Args:
        run: the run's folder.
        preset: the preset that the user names; must be the one that started the run, if it is recorded.

    Raises:
        TrainError: there is no checkpoint, it is damaged, or the preset differs.
    """
    folder = newest_checkpoint(run)
    try:
        config = read_config(folder)
    except CheckpointError as error:
        raise TrainError(f"{error}. {recovery_hint(run)}") from error
    command = shlex.split(config.provenance.get("command", ""))
    if command[:2] == ["iddpm", "train"] and command[2:3] != [preset]:
        raise TrainError(f"{run} was started from the preset {command[2]}; use that one instead of {preset}")
    return _trained_with(folder, config)


def find_origin(
    run: Path, config: TrainConfig, dataset: Dataset, validation: Dataset | None, *, accept_changed_data: bool
) -> tuple[SavedState, Origin]:
    """Read the newest checkpoint of a run, and check that the run may resume from it.

    Args:
        run: the run folder, claimed.
        config: configuration to continue with.
        dataset: data to continue with.
        validation: held-out data to continue with; may be new.
        accept_changed_data: continue although the data differ from those of the checkpoint.

    Returns:
        The content of the checkpoint, and the origin to record.

    Raises:
        TrainError: the checkpoint is damaged, a field changed that a resumed run may not change, or the data differ.
    """
    try:
        saved = train_state.read(newest_checkpoint(run))
    except CheckpointError as error:
        raise TrainError(f"{error}. {recovery_hint(run)}") from error
    _refuse_other_classes(run, saved.config, dataset)
    changed = config.differences(_trained_with(saved.folder, saved.config))
    if refused := {
        name: values for name, values in changed.items() if not MAY_CHANGE_ON_RESUME & {name, name.split(".")[0]}
    }:
        values = "; ".join(f"{name} was {old}, would be {new}" for name, (old, new) in refused.items())
        raise TrainError(
            f"{run} was started with other values: {values}. A resumed run may change "
            f"{', '.join(sorted(MAY_CHANGE_ON_RESUME))}; for other changes start a new run"
        )
    provenance = saved.config.provenance
    entry: dict[str, Any] = {"images_seen": saved.images_seen}
    if changed:
        entry["changed"] = {name: list(values) for name, values in changed.items()}
    compared = [("data", "trained", provenance.get("data", {}), dataset.description)]
    if "validation_data" in provenance:
        if validation is None:
            raise TrainError(f"{run} was validated on a data set of its own; add --validation, with the same data")
        compared.append(("validation_data", "validated", provenance["validation_data"], validation.description))
    for name, done, before, described in compared:
        if differences := data_differences(before, described):
            if not accept_changed_data:
                raise TrainError(
                    f"{run} was {done} on other data: {'; '.join(differences)}. If that is intended (an image was "
                    "removed or repaired), add --accept-changed-data: the run continues with the changed data"
                )
            entry[f"{name}_before"] = before
    earlier = list(provenance.get("resumed", []))
    return saved, Origin(saved.folder, earlier, entry if len(entry) > 1 else None)


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe how data differ from those of a checkpoint, regardless of their names; empty if they are equal.

    Entries that only one of the two descriptions has are not compared, because versions describe data in different
    detail. Data of different kinds (file, folder) always differ.
    """
    kinds = [kind_of(described) for described in (before, now)]
    if kinds[0] != kinds[1]:
        return [f"a {kinds[0] or 'source'} then, a {kinds[1] or 'source'} now"]
    kept = [name for name in before if name in now and name.removeprefix("cond_") not in NAMES_OF_DATA]
    common = [name for name in kept if before[name] != now[name]]
    return [f"{name} was {_short(before[name])}, is {_short(now[name])}" for name in common]


def kind_of(described: Mapping[str, Any]) -> str | None:
    """Return what a data set's description is of: one of NAMES_OF_DATA; None: of something else."""
    return next((name for name in NAMES_OF_DATA if name in described), None)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _refuse_other_classes(run: Path, config: AnyCheckpointConfig, dataset: Dataset) -> None:
    if config.class_names is not None and config.class_names != dataset.class_names:
        raise TrainError(
            f"{run} was trained with the classes {', '.join(config.class_names)}; the data now have "
            f"{', '.join(dataset.class_names)}. Use data with the same classes in the same order, or start "
            "a new run"
        )


def _trained_with(folder: Path, config: AnyCheckpointConfig) -> TrainConfig:
    """Return the configuration that a checkpoint records."""
    recorded = config.provenance.get("train_config")
    if not isinstance(recorded, dict):
        raise TrainError(f"{folder} does not record its training configuration, so a run cannot resume from it")
    parts = config.model_dump(include={"model", "diffusion", "sampling"})
    try:
        return TrainConfig.model_validate({**recorded, **parts})
    except ValidationError as error:
        raise TrainError(
            f"{folder} was trained with a configuration that is now refused: {describe_validation_error(error)}"
        ) from error


def recovery_hint(run: Path) -> str:
    """Return a sentence that describes how to continue without the newest checkpoint."""
    *older, newest = checkpoints(run)
    for folder in reversed(older):
        try:
            saved = train_state.read(folder)
        except CheckpointError:
            continue
        in_between = checkpoints(run)[checkpoints(run).index(folder) + 1 :]
        remove = " ".join(shlex.quote(str(path)) for path in in_between)
        return (
            f"The checkpoint after {saved.images_seen} images is intact: to continue from there, remove the later ones "
            f"(rm -r {remove}) and run this command again"
        )
    return f"No other checkpoint in {newest.parent} is intact: start a new run, with another --out"
