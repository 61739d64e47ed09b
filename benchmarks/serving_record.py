"""What benchmarks/serving.py measures, and the file that keeps it: a run per line, as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.open_loop import Answer
from benchmarks.peers.meter import Reading


@dataclass(frozen=True)
class Mark:
    """Counters of a network at a time of a run."""

    at: float
    reading: Reading


@dataclass(frozen=True, kw_only=True)
class Run:
    """One server under one load."""

    server: str
    load: float
    seed: int
    seconds: float
    """Seconds in which requests arrived."""
    width: int
    costs: Mapping[int, float]
    """c(n): seconds of a network call by rows, timed before the round."""
    answers: Sequence[Answer]
    marks: Sequence[Mark]
    """At the start, after the warm-up, after the last arrival, after the last answer."""
    facts: Mapping[str, str]

    @property
    def capacity(self) -> float:
        """Row-steps per second of the network alone at full width."""
        return self.width / self.costs[self.width]


RUNS = TypeAdapter(Run)


def append_run(record: Path, done: Run) -> None:
    """Add a line to the record."""
    with record.open("ab") as file:
        file.write(RUNS.dump_json(done) + b"\n")


def read_runs(record: Path) -> list[Run]:
    """Read the record back.

    Raises:
        ValueError: it does not exist, or is not a record.
    """
    if not record.exists():
        raise ValueError(f"{record} does not exist: nothing has been measured yet")
    return [RUNS.validate_json(line) for line in record.read_bytes().splitlines()]
