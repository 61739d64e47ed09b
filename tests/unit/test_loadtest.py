"""The files in deploy/loadtest send requests that the service accepts."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from cli.load.mixture import read_mixture
from service.http.kserve.routes import INPUTS
from service.requests.generate_request import GenerateRequest
from tests.paths import ROOT

FOLDER = ROOT / "deploy" / "loadtest"


@pytest.fixture
def locustfile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the file with stand-ins for what it uses of Locust, which the project does not install."""
    locust: Any = ModuleType("locust")
    locust.HttpUser, locust.between, locust.task = object, lambda least, most: None, lambda function: function
    monkeypatch.setitem(sys.modules, "locust", locust)
    spec = importlib.util.spec_from_file_location("locustfile", FOLDER / "locustfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def test_locust_sends_valid_requests_of_every_kind_by_weight(locustfile: ModuleType) -> None:
    draw = random.Random(1)
    drawn = [locustfile.draw_request(draw) for _ in range(2000)]
    for _, body in drawn[:200]:
        GenerateRequest.model_validate(body)
    counts = Counter(name for name, _ in drawn)
    weights = {kind["name"]: kind["weight"] for kind in locustfile.KINDS}
    assert counts.keys() == weights.keys()
    for name, weight in weights.items():
        assert counts[name] == pytest.approx(2000 * weight / sum(weights.values()), rel=0.2)
    assert len({body["seed"] for _, body in drawn}) == 2000


def test_perf_analyzer_sends_tensors_that_exist() -> None:
    requests = json.loads((FOLDER / "perf_analyzer.json").read_text(encoding="utf-8"))["data"]
    for tensors in requests:
        assert {INPUTS[name] for name in tensors} == {"INT64"}
        assert all(tensor["shape"] == [len(tensor["content"])] for tensor in tensors.values())
        fields = {name: tensor["content"][0] for name, tensor in tensors.items()}
        GenerateRequest.model_validate({"class": fields.pop("class_index"), **fields})


def test_iddpm_bench_reads_the_same_mixture(locustfile: ModuleType) -> None:
    kinds = read_mixture([str(FOLDER / "mix.json")])
    assert [kind.name for kind in kinds] == [kind["name"] for kind in locustfile.KINDS]
