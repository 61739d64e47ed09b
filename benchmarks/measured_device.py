"""A device whose steps were timed: the networks of RESULTS.md, and c(n) from a command line."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

STEP_SECONDS = "iddpm_engine_step_seconds"
ROWS_PER_S: Mapping[str, Mapping[int, float]] = {
    "fashion32": {1: 183.3, 2: 289.5, 4: 386.1, 8: 572.9},
    "c64": {1: 55.9, 2: 77.9, 4: 101.8, 8: 127.0},
    "cifar10": {1: 18.6, 4: 26.4, 16: 36.4},
    "imagenet64": {1: 6.1, 4: 7.2, 8: 7.7},
}
"""Rows per second by batch size, from RESULTS.md, "One network call", openvino:bf16 (2026-11-22)."""


@dataclass(frozen=True)
class MeasuredDevice:
    """A device on which batches of certain sizes were timed; other batches are padded to the next size."""

    call_s: Mapping[int, float]
    """Seconds of a step by its rows."""

    def __post_init__(self) -> None:
        """Check the measurements.

        Raises:
            ValueError: there are none, or one is impossible.
        """
        if not self.call_s or any(rows < 1 or seconds <= 0 for rows, seconds in self.call_s.items()):
            raise ValueError(f"call_s: needs sizes of at least 1 row with more than 0 s; got {dict(self.call_s)}")

    @classmethod
    def of(cls, network: str) -> Self:
        """Return the device of a network in RESULTS.md."""
        return cls({rows: rows / rate for rows, rate in ROWS_PER_S[network].items()})

    @classmethod
    def of_ms(cls, call_ms: Mapping[int, float]) -> Self:
        """Return a device with these milliseconds by rows."""
        return cls({rows: ms / 1000 for rows, ms in call_ms.items()})

    @classmethod
    def of_metrics(cls, text: str) -> Self:
        """Return the device of a replica, as `iddpm_engine_step_seconds` of its /metrics has it.

        Raises:
            ValueError: the replica has run no steps, or steps of several models.
        """
        sums: dict[int, float] = {}
        counts: dict[int, float] = {}
        models = set()
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name == STEP_SECONDS else ():
                models.add(sample.labels["model"])
                for suffix, values in (("_sum", sums), ("_count", counts)):
                    if sample.name == STEP_SECONDS + suffix:
                        values[int(sample.labels["padded_rows"])] = sample.value
        if len(models) != 1:
            raise ValueError(f"{STEP_SECONDS}: needs steps of one model; got {', '.join(sorted(models)) or 'none'}")
        return cls({rows: sums[rows] / count for rows, count in counts.items()})

    @property
    def width(self) -> int:
        """Maximum rows of a step."""
        return max(self.call_s)

    @property
    def capacity(self) -> float:
        """Row-steps per second at full width."""
        return self.width / self.call_s[self.width]

    def seconds(self, rows: int) -> float:
        """Return the seconds of a step of `rows` rows."""
        sizes = sorted(self.call_s)
        return self.call_s[sizes[bisect_left(sizes, rows)]]


def numbers(text: str) -> dict[int, float]:
    """Parse a list of NUMBER=VALUE.

    Raises:
        ValueError: it is none.
    """
    pairs = (part.split("=", 1) for part in text.split(","))
    return {int(name): float(value) for name, value in pairs}
