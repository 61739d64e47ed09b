"""The comparison of a real fleet with its simulation: no test here starts a process or measures a time."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from benchmarks.measure_fleet import Round, Summary, measured_steps, table
from benchmarks.null_network import NullDenoiser
from benchmarks.traffic import Arrival
from diffusion.network_inputs import NetworkInputs


def test_the_steps_of_all_replicas_are_averaged_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def scraped(url: str, **_: object) -> httpx.Response:
        seconds, count = {"a/metrics": (3.0, 10), "b/metrics": (1.0, 30)}[url]
        sample = 'iddpm_engine_step_seconds_{}{{model="null",padded_rows="{}"}} {}\n'
        lines = [
            "# TYPE iddpm_engine_step_seconds histogram\n",
            sample.format("count", 4, count),
            sample.format("sum", 4, seconds),
            sample.format("count", 8, 0),
            sample.format("sum", 8, 0.0),
        ]
        return httpx.Response(200, text="".join(lines))

    monkeypatch.setattr(httpx, "get", scraped)
    assert measured_steps(["a", "b"]) == {4: 0.1}


def test_a_summary_counts_from_the_due_times() -> None:
    requests = [Arrival(float(at), 10, 1) for at in range(100)]
    summary = Summary.of(requests, [at + (50.0 if at < 2 else 2.0) for at in range(100)])
    assert summary.figures == (2.0, 50.0, 100 / 101)
    assert Summary.pooled([summary, Summary((3.0,) * 100, 19.0)]).figures == (3.0, 3.0, 200 / 120)


def test_the_table_ends_with_the_medians_of_the_ratios_and_all_requests() -> None:
    def run(seed: int, factor: float) -> Round:
        real, simulated = Summary((1.0, 1.0, 2.0), 1.5), Summary((factor, factor, 2.0), 1.5)
        return Round(2, seed, real, simulated, real, {})

    *_, median, pooled = table([run(1, 0.5), run(2, 0.9), run(3, 2.0)]).splitlines()
    assert median.endswith("| **0.90 1.00 1.00** |")
    assert pooled == "| 2 | all | 9 | 1.00 / 2.00 / 1.00 | 2.00 / 2.00 / 2.00 | 2.00 / 2.00 / 2.00 | 2.00 1.00 1.00 |"


def test_a_network_can_take_the_time_of_a_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    monkeypatch.setattr("time.sleep", slept.append)
    network = NullDenoiser(8, 4, {2: 0.5, 4: 0.75})
    assert network.batch_sizes == (2, 4)

    def call(denoiser: NullDenoiser, rows: int) -> tuple[int, ...]:
        x_t = np.zeros((rows, 3, 8, 8), dtype=np.float32)
        predicted = denoiser(NetworkInputs(x_t=x_t, emb_t=x_t, y=None, cond=None))
        assert isinstance(predicted, np.ndarray)
        return predicted.shape

    assert call(network, 4) == (4, 6, 8, 8)
    assert slept == [0.75]
    at_once = NullDenoiser(8, 4)
    assert at_once.batch_sizes == (4,)
    assert call(at_once, 4) == (4, 6, 8, 8)
    assert slept == [0.75]
