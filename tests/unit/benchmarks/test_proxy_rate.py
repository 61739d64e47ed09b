"""HAProxy's processor time per request."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import proxy_rate
from benchmarks.haproxy import CONFIG
from benchmarks.proxy_rate import Case, keep_connections, measure, processor_seconds, table
from tests.programs import tool


@pytest.mark.parametrize("kept", [False, True])
def test_every_request_is_forwarded(tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 3.0])
    monkeypatch.setattr(proxy_rate, "processor_seconds", lambda _: next(seconds))
    assert measure(tool("haproxy"), Case("", 300_000, kept, requests=20), 3, tmp_path) == 0.1
    lines = (tmp_path / "haproxy.log").read_text(encoding="utf-8").splitlines()
    assert sum('"POST /v1/generate HTTP/1.1"' in line and " 200 " in line for line in lines) == 20 + 1


def test_kept_connections_differ_from_the_configuration_in_one_line() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    assert keep_connections(text).splitlines() == [line for line in text.splitlines() if "option httpclose" not in line]
    with pytest.raises(ValueError, match="must have the line 'option httpclose' once"):
        keep_connections("")


def test_the_processor_time_is_that_of_all_threads_so_far() -> None:
    before = os.times()
    seconds = processor_seconds(os.getpid())
    after = os.times()
    assert before.user + before.system - 0.02 <= seconds <= after.user + after.system + 0.02  # clock ticks of 10 ms


def test_the_rate_is_one_over_the_median() -> None:
    small, *_, large = table([[1e-4, 2e-4, 4e-4]] * 4).splitlines()[2:]
    assert small == "| 500 bytes, connection per request | 200 | 100 to 400 | 5,000 | 2 |"
    assert large.endswith("| 5,000 | 5,000 |")
