"""The serving benchmark: its traffic, its generator, its peers' sampler and its results; no test measures a time."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest

from benchmarks import serving
from benchmarks.networks import BUNDLED, BenchNetwork
from benchmarks.open_loop import NEVER_ANSWERED, Answer, Ask, offer
from benchmarks.peers.meter import MAX_ROWS, Meter, Reading, metered_network, new_meter, read_meter
from benchmarks.peers.one_at_a_time import create_app
from benchmarks.peers.request_sampler import RequestSampler, Uint8Array
from benchmarks.servers import Entry, Server, Site, command
from benchmarks.serving import check_pixels
from benchmarks.serving_record import Mark, Run, append_run, read_runs
from benchmarks.serving_report import Recovery, Window, slowdown, write_report
from benchmarks.traffic import MIX, Arrival, draw_arrivals, mean_row_steps
from diffusion.network_inputs import NetworkInputs, take_rows
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from service.backends.base import BackendOptions
from service.backends.openvino_backend import OpenVinoBackend
from tests.counts import LONG

# --- traffic


def test_arrivals_offer_the_requested_work() -> None:
    arrivals = draw_arrivals(1000.0, 5_000.0, seed=3)
    assert sum(a.row_steps for a in arrivals) / 5_000 == pytest.approx(1000, rel=0.03)
    assert {a.steps for a in arrivals} == set(MIX)
    assert {a.rows for a in arrivals} == {1, 2, 3, 4}
    assert mean_row_steps() == 262.5
    assert arrivals == draw_arrivals(1000.0, 5_000.0, seed=3)


# --- the generator


def ask(number: int, arrival: Arrival) -> Ask:
    return Ask("/", {"number": number, "steps": arrival.steps})


def test_requests_are_sent_before_earlier_ones_are_answered() -> None:
    everybody = asyncio.Event()
    seen: list[int] = []

    async def hold(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["number"])
        if len(seen) == 3:
            everybody.set()
        await everybody.wait()
        return httpx.Response(503 if seen[-1] == 9 else 200)

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(hold), base_url="http://server") as client:
            return await offer(client, [Arrival(at, 50, 1) for at in (0.0, 0.01, 0.02)], ask)

    answers = asyncio.run(run())
    assert seen == [0, 1, 2]
    assert [a.status for a in answers] == [200] * 3
    assert all(a.sent >= a.at and a.latency == a.ended - a.at for a in answers)


def test_a_lost_connection_does_not_count_as_an_answer() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(fail), base_url="http://server") as client:
            return await offer(client, [Arrival(0.0, 50, 1)], ask)

    assert asyncio.run(run())[0].status == NEVER_ANSWERED


# --- peers


def test_a_meter_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "meter"
    new_meter(path)
    meters = Meter(path), Meter(path)
    before = read_meter(path)
    for meter in meters:
        with meter.call(4, row_steps=3):
            pass
    did = read_meter(path).since(before)
    assert (did.calls[3], sum(did.calls), did.row_steps) == (2, 2, 6)
    assert did.busy_s == did.seconds[3] > 0


def test_a_metered_call_counts_the_time_of_the_device_not_of_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "meter"
    new_meter(path)
    network = metered_network(BUNDLED, BackendOptions(max_rows=4), path, (1.0, 0.5))
    x_t, emb_t = np.zeros((4, 1, 32, 32), np.float32), network.embed_timesteps(np.zeros(4, np.float32))
    call = network.begin(NetworkInputs(x_t, emb_t, None))
    assert read_meter(path).busy_s == 0
    assert call.wait().shape == (4, 2, 32, 32)
    assert (read_meter(path).calls[3], read_meter(path).busy_s) == (1, 0.003)
    assert network(NetworkInputs(x_t[:1], emb_t[:1], None)).shape == (1, 2, 32, 32)  # the device is free again
    assert read_meter(path).seconds[0] == 0.0015


def test_peers_give_the_pixels_of_the_reference(tmp_path: Path) -> None:
    new_meter(tmp_path / "meter")
    sampler = RequestSampler(BUNDLED, tmp_path / "meter", width=4, threads=1, turns="batch")
    pixels = sampler(4, [7, 7, 8], [0, 1, 0], [3, 3, 5])
    assert read_meter(tmp_path / "meter").row_steps == 12

    backend = OpenVinoBackend(BUNDLED, BackendOptions(max_rows=4, batch_sizes=(4,), threads=1, device="cpu"))

    class Padded:
        config = backend.config.model

        def embed_timesteps(self, t: Any, /) -> Any:
            return backend.embed_timesteps(t)

        def run(self, inputs: NetworkInputs[Any], /) -> Any:
            return backend(take_rows(inputs, np.array([0, 1, 2, 0])))[:3]

    specs = [ImageSpec(seed=s, image_index=i, class_index=c) for s, i, c in ((7, 0, 3), (7, 1, 3), (8, 0, 5))]
    expected = sample_images(Padded(), build_plan(backend.config.diffusion, "ancestral", "4"), specs, xp=np)
    np.testing.assert_array_equal(pixels, expected)


def test_one_at_a_time_serves_in_the_order_of_arrival() -> None:
    taken: list[int] = []

    def sampler(steps: int, seeds: Sequence[int], image_indices: Sequence[int], labels: Sequence[int]) -> Uint8Array:
        taken.append(seeds[0])
        assert ([*image_indices], [*labels], steps) == ([0, 1], [5, 5], 3)
        return np.full((2, 1, 1, 1), seeds[0], np.uint8)

    async def run() -> list[bytes]:
        transport = httpx.ASGITransport(create_app(sampler))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            bodies = [{"n": 2, "steps": 3, "seed": seed, "class": 5} for seed in range(4)]
            return [r.content for r in await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))]

    assert asyncio.run(run()) == [bytes([seed, seed]) for seed in range(4)]
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["bento", "iddpm,width=3", "triton,turns", "one-at-a-time,turns=call"])
def test_unknown_servers_and_settings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a server is one of|settings of"):
        Entry.parse(text)
    assert Entry.parse("triton,turns=call").settings == {"turns": "call", "delay-ms": "0", "batch": "0"}


def test_each_server_gets_the_network_to_run(tmp_path: Path) -> None:
    network = SimpleNamespace(checkpoint=tmp_path / "ours", diffusers_folder=lambda: tmp_path / "theirs")
    site = Site(
        network=cast("BenchNetwork", network),
        work=tmp_path,
        width=8,
        threads=1,
        device_ms=None,
        steps=(50,),
        venvs={},
    )
    for name, extra in (("one-at-a-time", []), ("iddpm", []), ("diffusers", ["--diffusers", str(tmp_path / "theirs")])):
        flags = command(Entry.parse(name), site, 80, tmp_path / "meter")
        assert flags[flags.index("--model") + 1] == str(tmp_path / "ours")
        assert flags[flags.index("--diffusers") :] == extra if extra else "--diffusers" not in flags


# --- figures


def reading(full_calls: float, half_calls: float, row_steps: float) -> Reading:
    """Make readings in which calls at 8 rows take 2 s, and those at 4 rows 1 s."""
    calls = [0.0] * MAX_ROWS
    calls[7], calls[3] = full_calls, half_calls
    return Reading(tuple(calls), tuple(2.0 * n if k == 7 else n for k, n in enumerate(calls)), row_steps)


def a_run(load: float = 1.3) -> Run:
    """Make a run: 16 of 20 s busy after the warm-up at 4 row-steps per second; 20 row-steps are left at the end."""
    return Run(
        server="iddpm",
        load=load,
        seed=1,
        seconds=30.0,
        width=8,
        costs={4: 1.0, 8: 2.0},
        answers=[
            Answer(at=1.0, steps=10, rows=4, sent=1.001, ended=21.0, status=200),
            Answer(at=2.0, steps=5, rows=8, sent=2.0, ended=35.0, status=200),
            Answer(at=3.0, steps=99, rows=1, sent=3.0, ended=3.1, status=503),
        ],
        marks=[
            Mark(0.0, reading(0, 0, 0)),
            Mark(10.0, reading(1, 0, 8)),
            Mark(30.0, reading(7, 4, 60)),
            Mark(36.0, reading(9, 6, 80)),
        ],
        facts={"Commit": "c"},
    )


def test_goodput_and_busy_time_exclude_the_warm_up() -> None:
    window = Window.of(a_run())
    assert window.goodput == (60 - 8) / 20 / 4
    assert window.busy == (6 * 2 + 4 * 1) / 20
    assert window.rows_per_call == 52 / 10
    assert window.full_call_s == 2.0
    assert window.goodput_then == (60 - 8) / 20 / 4
    assert window.offered_then == 0


def test_goodput_and_load_are_also_given_by_call_times_of_the_run_itself() -> None:
    first, second, refused = a_run().answers
    answers = [first, replace(second, at=12.0), refused]
    run = replace(a_run(), costs={4: 0.5, 8: 1.0}, answers=answers)  # the machine was faster when it was timed
    window = Window.of(run)
    assert window.goodput == (60 - 8) / 20 / 8
    assert window.goodput_then == (60 - 8) / 20 / 4
    assert window.offered_then == 40 / 20 / 4


def test_recovery_is_the_time_of_accepted_work_after_the_last_request() -> None:
    recovery = Recovery.of(a_run())
    assert recovery.backlog_s == (40 + 40 - 60) / 4
    assert recovery.took_s == 35.0 - 30.0


def test_slowdown_is_relative_to_the_network_s_time_alone() -> None:
    run = a_run()
    assert slowdown(run, run.answers[0]) == 20.0 / (10 * 1.0)
    assert slowdown(run, run.answers[1]) == 33.0 / (5 * 2.0)


def test_runs_are_read_back_as_they_were_written_and_reported(tmp_path: Path) -> None:
    record = tmp_path / "serving.jsonl"
    for load in (0.8, 1.3):
        append_run(record, a_run(load))
    runs = read_runs(record)
    assert runs == [a_run(0.8), a_run(1.3)]
    write_report(tmp_path, runs)
    text = (tmp_path / "serving.md").read_text()
    assert "| iddpm | 3 | 1.49 | 1 | 26.50 | 20.00 | 33.00 | 33.00 | 3.3 / 2.0 | 0.67 |" in text
    assert "| 0.67 | 0.650 | 0.800 | 5.2 | 2000.0 ms | 0.650 | 0.000 |" in text
    assert "| iddpm | 5.0 | 5.0 | 1.00 |" in text
    assert "sent requests at most 1 ms after they were due" in text


def test_the_report_states_that_nothing_was_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing has been measured yet"):
        read_runs(tmp_path / "serving.jsonl")
    assert serving.parse_arguments(["--report"]).report


def test_a_server_with_other_pixels_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def picture(server: Server, client: httpx.Client, arrival: Arrival) -> Uint8Array:
        return np.full(3, server.entry.text == "litserve", np.uint8)

    monkeypatch.setattr(Server, "picture", picture)
    nothing = cast("subprocess.Popen[bytes]", None)
    servers = [
        Server(Entry.parse(text), "http://x", tmp_path, tmp_path, nothing) for text in ("iddpm", "triton", "litserve")
    ]
    check_pixels(servers[:2], 50)
    with pytest.raises(ValueError, match="the pixels of litserve differ from those of iddpm"):
        check_pixels(servers, 50)


@pytest.mark.parametrize(
    "server",
    ["one-at-a-time", pytest.param("iddpm", marks=pytest.mark.skipif(not LONG, reason="seconds: IDDPM_TEST_LONG=1"))],
)
def test_the_quick_comparison_measures_a_real_server(server: str, tmp_path: Path) -> None:
    options = ["--quick", "--servers", server, "--loads", "0.5", "--seconds", "1", "--out", str(tmp_path)]
    serving.run(serving.parse_arguments(options))
    (run,) = read_runs(tmp_path / "serving.jsonl")
    assert run.server == server
    assert {answer.status for answer in run.answers} == {200}
    start, _, _, end = run.marks
    assert end.reading.since(start.reading).row_steps == sum(a.row_steps for a in run.answers)
