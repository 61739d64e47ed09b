"""The measurement of bulk generation on Ray, without Ray: which images and which seconds count."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bulk_ray
from benchmarks.bulk_ray import Rates, Reading, read_clocks
from deploy.ray.bulk import Pool
from tests.generations import COUNT, PIXELS, generation

BURN = """
import time
begun = time.process_time()
while time.process_time() - begun < 0.2:
    pass
print(1, flush=True)
input()
"""


def test_the_seconds_of_workers_count_and_those_of_ray_are_apart() -> None:
    before = read_clocks()
    processes = []
    for name in ("ray::MapWorker(MapBatches(Worker)).submit", "ray::IDLE", "another"):
        command = [name, "-c", BURN]
        processes.append(
            subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        own = os.times()
        spent = read_clocks().since(before)
    finally:
        for process in processes:
            process.communicate(b"\n")
    assert 0.2 <= spent.ray < spent.wall
    assert 0.2 <= spent.cpu <= spent.wall + own.user + own.system


def test_images_count_from_the_first_batch_of_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(bulk_ray, "WORK", tmp_path)
    monkeypatch.setattr(bulk_ray, "read_clocks", lambda: Reading(wall=next(clock), cpu=10.0, ray=0.0))

    def produce_on(pool: Pool, images: Any) -> Any:
        def produce(missing: list[range], advance: Any) -> Iterator[Any]:
            for shard in missing:
                advance(0)  # nothing has arrived
                advance(len(shard))
                yield shard, PIXELS[shard.start : shard.stop]

        return produce

    monkeypatch.setattr(bulk_ray, "produce_on", produce_on)
    pool: Any = Pool(workers=1, settings=None, reserved={})  # type: ignore[arg-type]  # not used
    rates = bulk_ray.on_ray(pool, generation(shard_size=4))
    assert rates == Rates(COUNT - 4, Reading(wall=2, cpu=0.0, ray=0.0))
    assert rates.per_wall_second == (COUNT - 4) / 2
    with pytest.raises(RuntimeError, match="generate more images"):
        bulk_ray.on_ray(pool, generation(shard_size=COUNT))


def test_the_report_has_the_share_of_the_engine_of_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "the engine alone": [Rates(10, Reading(2, 1, 0)), Rates(10, Reading(2, 2, 0))],
        "1 worker on Ray": [Rates(10, Reading(4, 1.25, 0.1)), Rates(10, Reading(4, 2, 0.1))],
    }
    monkeypatch.setattr(bulk_ray, "compare", lambda args: found)
    bulk_ray.report(bulk_ray.parse_arguments(["model", "--out", str(tmp_path)]))
    assert "| 1 worker on Ray | 6.50 (5.00 to 8.00) | 90.0 % (80 to 100) | 2.50 (2.50 to 2.50) | 10.0 |" in (
        tmp_path / "bulk_ray.md"
    ).read_text(encoding="utf-8")
    assert "1 worker on Ray" in capsys.readouterr().out
