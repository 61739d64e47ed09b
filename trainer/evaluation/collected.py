"""Find what runs and evaluations have written: logs, sample grids, results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formats.json_files import read_object
from trainer.evaluation.errors import EvaluationError
from trainer.run_folder import LOG_FILE, OLD_LOG_FILE, SAMPLES_FOLDER, TRAIN_CONFIG_FILE

RESULTS_FILE = "results.json"
KINDS = ("samples", "nll", "noise-scale", "scaling")

Line = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of an evaluation."""

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.content["kind"])


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a folder holds; every part may be missing."""

    name: str
    folder: Path
    lines: list[Line] = field(default_factory=list)
    """Lines of the log, in order of their training images."""
    config: dict[str, Any] | None = None
    grids: list[tuple[int, Path]] = field(default_factory=list)
    """Sample grids by training images."""
    results: list[Results] = field(default_factory=list)


def collect(path: Path) -> Collected:
    """Return what a run's folder, an evaluation's folder, or a results file holds.

    Raises:
        EvaluationError: nothing was found there, or a file is damaged.
    """
    if path.is_file():
        return Collected(name=path.parent.name, folder=path.parent, results=list(_results([path])))
    if not path.is_dir():
        raise EvaluationError(f"{path} does not exist; name the folder of a run or of an evaluation")
    log = next((path / name for name in (LOG_FILE, OLD_LOG_FILE) if (path / name).is_file()), None)
    config = path / TRAIN_CONFIG_FILE
    found = Collected(
        name=path.resolve().name,
        folder=path,
        lines=[] if log is None else read_log(log),
        config=read_object(config) if config.is_file() else None,
        grids=sorted((int(grid.stem), grid) for grid in (path / SAMPLES_FOLDER).glob("*.png") if grid.stem.isdecimal()),
        results=list(_results(sorted(path.rglob(RESULTS_FILE)))),
    )
    if not (found.lines or found.config or found.grids or found.results):
        raise EvaluationError(f"{path} holds neither a run ({LOG_FILE}) nor an evaluation ({RESULTS_FILE})")
    return found


def read_log(path: Path) -> list[Line]:
    """Read the complete lines of a log; a line that is being written, or was cut off, is left out."""
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "images" in line:
            lines.append(line)
    return sorted(lines, key=lambda line: line["images"])


def _results(paths: Iterable[Path]) -> Iterable[Results]:
    for path in paths:
        try:
            content = read_object(path)
        except (OSError, ValueError) as error:
            raise EvaluationError(str(error)) from error
        if content.get("kind") in KINDS:
            yield Results(path=path, content=content)


def of_kind(found: Sequence[Collected], kind: str) -> list[Results]:
    """Return all results of a kind."""
    return [results for each in found for results in each.results if results.kind == kind]


def distinct_names(found: Sequence[Collected]) -> list[str]:
    """Return a name per folder; equal names get a number."""
    names: list[str] = []
    for each in found:
        count = sum(name == each.name or name.startswith(f"{each.name} (") for name in names)
        names.append(f"{each.name} ({count + 1})" if count else each.name)
    return names
