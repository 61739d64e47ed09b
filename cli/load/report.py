"""The results of a load: percentiles by kind of request, errors, and the JSON file of `iddpm bench --out`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from cli.load.recorder import RequestRecord


def percentile(values: Iterable[float], part: float) -> float:
    """Return the smallest of the values that at least this fraction of them does not exceed.

    Raises:
        ValueError: there are no values.
    """
    return float(np.quantile([*values], part, method="inverted_cdf"))


class Result(BaseModel):
    """A part of the report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Percentiles(Result):
    """A distribution; each percentile is one of the values."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Summarise values; None if there are none."""
        given = [*values]
        if not given:
            return None
        p50, p95, p99 = (percentile(given, part) for part in (0.5, 0.95, 0.99))
        return cls(mean=float(np.mean(given)), p50=p50, p95=p95, p99=p99, max=max(given))


class Prediction(Result):
    """A time that the service predicted at admission, in seconds, and what it was."""

    real_s: Percentiles
    predicted_s: Percentiles
    error_s: Percentiles
    """Absolute difference of both, by request."""
    bias_s: float
    """Mean of predicted - real."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Self | None:
        """Compare pairs of (predicted, real) times; None if there are none."""
        real = Percentiles.of(real for _, real in pairs)
        predicted = Percentiles.of(predicted for predicted, _ in pairs)
        error = Percentiles.of(abs(predicted - real) for predicted, real in pairs)
        if real is None or predicted is None or error is None:
            return None
        bias = float(np.mean([predicted - real for predicted, real in pairs]))
        return cls(real_s=real, predicted_s=predicted, error_s=error, bias_s=bias)


class Group(Result):
    """Results of the requests of a kind, or of all."""

    requests: int
    answered: int
    failed: int
    unfinished: int
    images: int
    images_per_s: float
    alone_s: float | None
    """Latency of one request that was sent before the load; None of several kinds together."""
    latency_s: Percentiles | None
    """Of answered requests, from the planned time to the complete answer."""
    wait: Prediction | None
    """From admission to the first network call."""
    finish: Prediction | None
    """From admission to the last image."""

    @classmethod
    def of(cls, records: Sequence[RequestRecord], elapsed_s: float, alone_s: float | None = None) -> Self:
        """Summarise records; `elapsed_s` is the duration of the load with its last answer."""
        answered = [record for record in records if record.outcome == "answered"]
        outcomes = Counter(record.outcome for record in records)
        images = sum(record.images for record in answered)
        timings = [record.timing for record in answered if record.timing is not None]
        return cls(
            requests=len(records),
            answered=len(answered),
            failed=outcomes["failed"],
            unfinished=outcomes["unfinished"],
            images=images,
            images_per_s=images / elapsed_s,
            alone_s=alone_s,
            latency_s=Percentiles.of(record.latency_s for record in answered),
            wait=Prediction.of([(timing.predicted_wait_s, timing.wait_s) for timing in timings]),
            finish=Prediction.of([(timing.predicted_finish_s, timing.finish_s) for timing in timings]),
        )


class FailureCount(Result):
    """Requests that failed for the same reason."""

    status: int | None
    """HTTP status; None: there was no answer."""
    reason: str
    count: int


class KindReport(Group):
    """A kind of request and its results."""

    name: str
    weight: float
    fields: dict[str, Any]


class ServedBy(Result):
    """A model that the load used, as the service described it before the load."""

    name: str
    backend: str
    numerics_id: str


class Report(Result):
    """The results of a load."""

    format: Literal["iddpm-bench-1"] = "iddpm-bench-1"
    """Changes if a field changes its meaning or is removed."""
    version: str
    """Of iddpm, where the load came from."""
    url: str
    started: datetime
    models: list[ServedBy]
    rate: float | None
    """Planned requests per second of an open loop."""
    concurrency: int | None
    """Requests in flight of a closed loop."""
    duration_s: float
    """Planned time in which requests are sent."""
    seed: int
    elapsed_s: float
    """Time from the start to the last answer, at least the time in which requests were sent."""
    ended_early: bool
    """Whether a signal (Ctrl-C) ended the load."""
    late_s: Percentiles | None
    """How late the generator sent requests."""
    failures: list[FailureCount]
    all: Group
    kinds: list[KindReport]
    requests: list[RequestRecord]
    """In the order of their planned times."""


def count_failures(records: Iterable[RequestRecord]) -> list[FailureCount]:
    """Count failed requests by status and reason, the most frequent first."""
    counts = Counter((r.status, r.error or "") for r in records if r.outcome == "failed")
    return [FailureCount(status=status, reason=reason, count=n) for (status, reason), n in counts.most_common()]
