"""The folder of an evaluation: locked while one process writes there, and of one set of settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats.atomic_file import write_file
from formats.folder_lock import folder_lock
from formats.json_files import read_object
from trainer.evaluation.errors import EvaluationError
from trainer.run_folder import warn

SETTINGS_FILE = "settings.json"


class EvaluationStopped(Exception):
    """The evaluation was stopped by a request; what is done is recorded, and a repeated command continues."""


@contextmanager
def evaluation_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Create or reopen a folder for an evaluation with these settings, and lock other processes out.

    Args:
        folder: created if it does not exist.
        settings: everything that determines the results, for JSON; recorded in the folder.

    Raises:
        EvaluationError: the folder was started with other settings, or it holds other files.
        FolderInUse: another process uses the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise EvaluationError(f"--out must be a folder; {folder} is not one")
    path = folder / SETTINGS_FILE
    if folder.is_dir() and not path.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise EvaluationError(f"{folder} contains files of something else; use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) as unlocked:
        if unlocked is not None:
            warn(f"{folder} cannot be locked ({unlocked.strerror}): make sure that no other process writes there")
        wanted = json.loads(json.dumps(settings))
        if path.exists():
            _refuse_other(folder, read_object(path), wanted)
        else:
            write_file(path, (json.dumps(wanted, indent=2) + "\n").encode())
        yield


def _refuse_other(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise EvaluationError(
                f"{folder} was started with {name} {found.get(name)!r}, which is now {wanted.get(name)!r}; "
                f"use another --out"
            )
