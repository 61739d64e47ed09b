"""The script of a GPU session, run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_session
from benchmarks.contenders import Place
from benchmarks.gpu_session import CALLS, Result, Session
from benchmarks.networks import BUNDLED, BenchNetwork
from tests.counts import LONG


def session(tmp_path: Path) -> Session:
    network = BenchNetwork("fashion32", BUNDLED, tmp_path, trained=True)
    place = Place(device=torch.device("cpu"), threads=1)
    return Session(place=place, network=network, sizes=(1, 2), toy=True)


def test_a_section_that_fails_does_not_end_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Session) -> Result:
        raise RuntimeError("no such kernel\nsecond line")

    def works(_: Session) -> Result:
        return {"rate": 1234.5678, "sizes": (1, 2)}

    monkeypatch.setitem(gpu_session.SECTIONS, "lives", (fails, works))
    gpu_session.run_call("lives", session(tmp_path), tmp_path)
    found = json.loads((tmp_path / "gpu_session_lives.json").read_text())
    assert found["fails"]["error"] == "RuntimeError: no such kernel"
    assert found["works"]["sizes"] == [1, 2]
    written = gpu_session.report(tmp_path)
    assert "| error | RuntimeError: no such kernel |" in written
    assert "| rate | 1235 |" in written
    assert "### time\n\nNot run." in written


def test_no_section_begins_after_the_time_is_up(tmp_path: Path) -> None:
    found = gpu_session.run_call("stress", session(tmp_path), tmp_path, budget_s=-1)
    assert [result["skipped"] for result in found.values()] == ["the time was up"] * len(gpu_session.SECTIONS["stress"])


@pytest.mark.skipif(not LONG, reason="takes a minute per call")
@pytest.mark.parametrize("call", CALLS)
def test_all_sections_run_on_a_cpu(call: str, tmp_path: Path) -> None:
    found = gpu_session.run_call(call, session(tmp_path), tmp_path)
    assert not {title: result["trace"] for title, result in found.items() if "trace" in result}
    if call == "stress":
        assert found["joins"]["images"] > 0
        assert found["joins"]["different"] == []
        assert found["joins"]["spoiled"] > 0
        assert found["two_models"]["equal"]
