"""The measurement of bulk generation on Ray, without Ray: which images and which seconds count."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bulk_ray
from benchmarks.bulk_ray import Rates, Reading, Spent, read_clocks
from deploy.ray.bulk import Pool
from service.settings import Settings
from tests.generations import COUNT, PIXELS, generation
from tests.paths import ROOT

BURN = """
import time
begun = time.process_time()
while time.process_time() - begun < 0.2:
    pass
print(1, flush=True)
input()
"""


RAYLET = """
import subprocess, sys
names = ["ray::MapWorker(MapBatches(Worker)).submit", "ray::IDLE"]
burn, python = sys.argv[2:]
children = [
    subprocess.Popen([name, "-c", burn], executable=python, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for name in names
]
for child in children:
    child.stdout.readline()
print(1, flush=True)
input()
for child in children:
    child.communicate(b"\\n")
"""


def test_the_seconds_of_workers_count_those_of_ray_are_apart_and_other_clusters_are_not_there() -> None:
    before = read_clocks("10.0.0.1:6379")
    raylets = [
        subprocess.Popen(
            ["/ray/raylet", "-c", RAYLET, f"--gcs-address={address}", BURN, sys.executable],
            executable=sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for address in ("10.0.0.1:6379", "10.0.0.2:6379")
    ]
    try:
        for raylet in raylets:
            assert raylet.stdout is not None
            raylet.stdout.readline()
        own = time.process_time()
        spent = read_clocks("10.0.0.1:6379").since(before)
        both = read_clocks(":6379").since(before)
    finally:
        for raylet in raylets:
            raylet.communicate(b"\n")
    assert spent.ray >= 0.2
    assert both.ray >= spent.ray + 0.2
    assert 0.2 <= spent.cpu <= both.cpu - 0.2 + own


def test_images_count_from_the_first_batch_of_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))

    def clocks() -> Reading:
        return Reading(wall=next(seconds), cpu={}, ray={})

    monkeypatch.setattr(bulk_ray, "WORK", tmp_path)

    def produce_on(pool: Pool, images: Any) -> Any:
        def produce(missing: list[range], advance: Any) -> Iterator[Any]:
            for shard in missing:
                advance(0)  # nothing has arrived
                advance(len(shard))
                yield shard, PIXELS[shard.start : shard.stop]

        return produce

    monkeypatch.setattr(bulk_ray, "produce_on", produce_on)
    pool: Any = Pool(workers=1, settings=None, reserved={})  # type: ignore[arg-type]  # not used
    rates = bulk_ray.on_ray(pool, generation(shard_size=4), clocks)
    assert rates == Rates(COUNT - 4, Spent(wall=2, cpu=0.0, ray=0.0))
    assert rates.per_wall_second == (COUNT - 4) / 2


def test_each_worker_needs_ten_batches() -> None:
    settings = Settings(models=(ROOT / "models" / "fashion32",), max_rows=2)  # batches of 8 images
    two = Pool(workers=2, settings=settings, reserved={})
    bulk_ray.check_batches(two, generation(count=80, shard_size=4))
    bulk_ray.check_batches(two, generation(count=160, shard_size=1000))
    with pytest.raises(ValueError, match="76 in shards of 4 are 19 batches of at most 8; 2 workers need at least 20"):
        bulk_ray.check_batches(two, generation(count=76, shard_size=4))
    with pytest.raises(ValueError, match="19 batches"):
        bulk_ray.check_batches(two, generation(count=152, shard_size=1000))


def test_seconds_of_workers_that_end_do_not_count_as_negative() -> None:
    """Ray ends idle workers of an earlier pool while the engine alone is measured."""
    me, ended, stays, idle = (1, 100), (2, 100), (3, 100), (4, 100)
    before = Reading(wall=0, cpu={me: 5.0, ended: 60.0, stays: 7.0}, ray={idle: 1.0})
    again = (ended[0], 200)  # another process with the same number
    after = Reading(wall=10, cpu={me: 9.0, stays: 7.0, idle: 3.0}, ray={again: 0.5})
    assert after.since(before) == Spent(wall=10, cpu=4.0 + 2.0, ray=0.5)


def test_the_report_has_the_share_of_the_engine_of_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        "the engine alone": [Rates(10, Spent(2, 1, 0)), Rates(10, Spent(2, 2, 0))],
        "1 worker on Ray": [Rates(10, Spent(4, 1.25, 0.1)), Rates(10, Spent(4, 2, 0.1))],
    }
    monkeypatch.setattr(bulk_ray, "compare", lambda args: found)
    bulk_ray.report(bulk_ray.parse_arguments(["model", "--out", str(tmp_path)]))
    assert "| 1 worker on Ray | 6.50 (5.00 to 8.00) | 90.0 % (80 to 100) | 2.50 (2.50 to 2.50) | 10.0 |" in (
        tmp_path / "bulk_ray.md"
    ).read_text(encoding="utf-8")
    assert "1 worker on Ray" in capsys.readouterr().out
