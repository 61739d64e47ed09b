"""The ensemble folder: several networks of one process, each used at some timesteps (IDDPM, appendix D).

    ensemble.json   the members, and the timesteps at which each is used
    NAME/           a member: a checkpoint, an artifact, or a checkpoint with its artifact inside

Nothing outside the folder is referred to. Nothing here needs PyTorch or a runtime.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from diffusion.config import CheckpointConfig, FrozenConfig
from diffusion.respacing import IntArray
from formats.artifact import MANIFEST_FILE, ArtifactError, find_artifact, read_artifact
from formats.atomic_folder import may_replace, write_folder
from formats.checkpoint_config import (
    CONFIG_FILE,
    CheckpointError,
    checkpoint_sha256,
    describe_validation_error,
    read_config,
)
from formats.classifier_folder import CLASSIFIER_FOLDER, find_classifier
from formats.json_files import read_object

ENSEMBLE_FILE = "ensemble.json"
LEFT_OUT = ("state", ".*")
"""What is not copied of a member: the state of its training, and hidden files."""


class EnsembleError(ValueError):
    """An ensemble folder cannot be written or read; the message names the member and the rule."""


class TimestepRange(FrozenConfig):
    """Timesteps first..end-1 and the member that is used there."""

    first: int = Field(ge=0)
    end: int = Field(ge=1)
    member: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """Name of a subfolder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.first >= self.end:
            raise ValueError(f"a range must hold a timestep; got {self.first}:{self.end}")
        return self


class EnsembleFile(FrozenConfig):
    """The content of `ensemble.json`."""

    format_version: Literal[1] = 1
    kind: Literal["ensemble"] = "ensemble"
    ranges: tuple[TimestepRange, ...] = Field(min_length=1)
    """Ascending and without gaps, from timestep 0 to T."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        ends = [0, *(one.end for one in self.ranges)]
        for one, end in zip(self.ranges, ends, strict=False):
            if one.first != end:
                raise ValueError(f"ranges must be ascending without gaps: {one.first}:{one.end} follows {end}")
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class Ensemble:
    """A checked ensemble folder."""

    folder: Path
    config: CheckpointConfig
    """That of the member with the most timesteps: its class names, sampling defaults and provenance are the ensemble's.
    The process, the shape and the classes are those of every member."""
    members: tuple[str, ...]
    """Names of the subfolders, in the order of their first range."""
    network_of: IntArray
    """int64 [T]: index of the member of each training timestep."""
    sha256: str
    """Hash of the members' checkpoints and of the ranges."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the folders of the members."""
        return tuple(self.folder / name for name in self.members)


def is_ensemble(folder: Path) -> bool:
    """Return whether a folder is an ensemble."""
    return (folder / ENSEMBLE_FILE).is_file()


def read_ensemble(folder: Path) -> Ensemble:
    """Read an ensemble folder and check that its members fit together.

    Raises:
        EnsembleError: the file is missing or invalid, a member is missing or cannot be read, members differ, or the
            ranges do not end at T.
    """
    path = folder / ENSEMBLE_FILE
    try:
        described = EnsembleFile.model_validate(read_object(path))
    except FileNotFoundError as error:
        raise EnsembleError(f"{folder} is not an ensemble: it has no {ENSEMBLE_FILE}") from error
    except ValidationError as error:
        raise EnsembleError(f"{path}: {describe_validation_error(error)}") from error
    except ValueError as error:
        raise EnsembleError(str(error)) from error
    names = tuple(dict.fromkeys(one.member for one in described.ranges))
    for name in names:
        if not (folder / name).is_dir():
            raise EnsembleError(f"{path}: member {name!r} is missing: there is no folder {folder / name}")
    found = {name: _member(folder / name) for name in names}
    return _checked(folder, described.ranges, found)


def write_ensemble(folder: Path, ranges: Sequence[tuple[int, int, Path]]) -> Ensemble:
    """Write an ensemble folder atomically, with copies of its members; replace an existing ensemble.

    Args:
        folder: the folder to write.
        ranges: (first, end, model folder); negative numbers count from T, and an end of 0 means T.

    Raises:
        EnsembleError: a model cannot be read, the models or ranges do not fit, or the target exists and is not an
            ensemble.
        OSError: as for `write_folder`.
    """
    folder = folder.resolve()
    if not may_replace(folder, ENSEMBLE_FILE, ("ranges",)):
        raise EnsembleError(f"{folder} exists and is not an ensemble; it was not changed")
    sources = list(dict.fromkeys(source.resolve() for *_, source in ranges))
    for source in sources:
        if folder == source or folder in source.parents:
            raise EnsembleError(f"the ensemble cannot replace a folder that contains its member {source}")
    members = dict(zip(sources, _names(sources), strict=True))
    found = {name: _member(source) for source, name in members.items()}
    steps = next(iter(found.values())).config.diffusion.num_timesteps
    try:
        named = [
            TimestepRange(
                first=first % steps if first < 0 else first,
                end=end + steps if end <= 0 else end,
                member=members[source.resolve()],
            )
            for first, end, source in ranges
        ]
        described = EnsembleFile(ranges=tuple(sorted(named, key=lambda one: one.first)))
    except ValidationError as error:
        raise EnsembleError(describe_validation_error(error)) from error
    _checked(folder, described.ranges, found)

    def write(temporary: Path) -> None:
        for source, name in members.items():
            shutil.copytree(source, temporary / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        text = json.dumps(described.model_dump(mode="json"), indent=2) + "\n"
        (temporary / ENSEMBLE_FILE).write_text(text, encoding="utf-8")

    write_folder(folder, write)
    return read_ensemble(folder)


@dataclass(frozen=True)
class _Member:
    config: CheckpointConfig
    sha256: str
    """Of its checkpoint."""
    classifier: str | None
    """Hash of the checkpoint of the classifier that guides it."""


def _member(folder: Path) -> _Member:
    try:
        if (folder / CONFIG_FILE).is_file():
            config, sha256 = read_config(folder), checkpoint_sha256(folder)
        elif (artifact := find_artifact(folder)) is not None:
            manifest = read_artifact(artifact)
            config, sha256 = manifest.checkpoint, manifest.checkpoint_sha256
        else:
            raise EnsembleError(
                f"{folder} holds neither a checkpoint ({CONFIG_FILE}) nor an artifact ({MANIFEST_FILE})"
            )
        classifier = find_classifier(folder)
        guided_by = None if classifier is None else _classifier_sha256(classifier)
    except (CheckpointError, ArtifactError) as error:
        raise EnsembleError(str(error)) from error
    if not isinstance(config, CheckpointConfig):
        raise EnsembleError(f"{folder} holds a classifier, which cannot be a member")
    return _Member(config, sha256, guided_by)


def _classifier_sha256(folder: Path) -> str:
    if (folder / CONFIG_FILE).is_file():
        return checkpoint_sha256(folder)
    return read_artifact(folder).checkpoint_sha256


def _checked(folder: Path, ranges: Sequence[TimestepRange], found: Mapping[str, _Member]) -> Ensemble:
    names = tuple(dict.fromkeys(one.member for one in ranges))
    first = found[names[0]]
    for name in names[1:]:
        for field, here, there in _differences(first, found[name]):
            raise EnsembleError(f"members must agree in {field}: {names[0]} has {here!r}, {name} has {there!r}")
    steps = first.config.diffusion.num_timesteps
    if ranges[-1].end != steps:
        raise EnsembleError(f"ranges must end at num_timesteps, {steps}; the last one ends at {ranges[-1].end}")
    network_of = np.repeat([names.index(one.member) for one in ranges], [one.end - one.first for one in ranges])
    main = names[int(np.bincount(network_of).argmax())]
    parts = [*(f"{name} {found[name].sha256}" for name in names), network_of.astype("<i8").tobytes().hex()]
    return Ensemble(
        folder=folder,
        config=found[main].config,
        members=names,
        network_of=network_of.astype(np.int64),
        sha256=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
    )


def _differences(one: _Member, other: _Member) -> list[tuple[str, object, object]]:
    shapes = ("image_size", "image_channels", "low_res_size", "cond_channels")
    fields = (*shapes, "num_classes", "null_class", "learn_sigma")
    pairs = [(f"model.{name}", getattr(one.config.model, name), getattr(other.config.model, name)) for name in fields]
    mine, theirs = one.config.diffusion.model_dump(), other.config.diffusion.model_dump()
    pairs += [(f"diffusion.{name}", mine[name], theirs[name]) for name in mine]
    pairs += [(name, getattr(one.config, name), getattr(other.config, name)) for name in ("value_range", "cond_range")]
    pairs.append(("class_names", one.config.class_names, other.config.class_names))
    pairs.append((f"their classifier ({CLASSIFIER_FOLDER}/)", one.classifier, other.classifier))
    return [pair for pair in pairs if pair[1] != pair[2]]


def _names(sources: Sequence[Path]) -> list[str]:
    """Return the names of the members: of their folders, of the run around RUN/model, numbered where equal."""
    plain = [source.parent.name if source.name == "model" else source.name for source in sources]
    plain = ["".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name) for name in plain]
    plain = [name.lstrip(".-") or "member" for name in plain]
    names: list[str] = []
    for name in plain:
        if plain.count(name) > 1:
            numbered = (f"{name}_{number}" for number in itertools.count(1))
            name = next(one for one in numbered if one not in plain and one not in names)
        names.append(name)
    return names
