"""A load for `iddpm bench`: its schedule, its mixture, its records and its report; no test measures a time."""

from __future__ import annotations

import asyncio
import io
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from cli.client import AsyncClient, ModelInfo
from cli.load import recorder as recorder_module
from cli.load.loops import closed_loop, poisson_times
from cli.load.mixture import DEFAULT_MIXTURE, RequestKind, draw_request, read_mixture
from cli.load.plot import latency_plot
from cli.load.progress import live_line, live_progress
from cli.load.recorder import Recorder, RequestRecord
from cli.load.report import Group, Percentiles, Report, count_failures, percentile
from cli.load.run import Load, TrialFailed, run_load, try_kinds
from cli.load.text import report_text
from service.http.native.schemas import Timing
from tests.waiting import run_async

MODEL = ModelInfo(
    name="m",
    image_size=8,
    image_channels=1,
    value_range=(0, 255),
    cond=None,
    classes=None,
    num_timesteps=10,
    guidance=False,
    default_cfg_scale=1,
    classifier_guidance=False,
    numerics_id="0123456789abcdef",
    backend="none",
)


def answer(images: int = 1, predicted_wait_s: float = 0.5, wait_s: float = 1.0) -> httpx.Response:
    image = {
        "b64_json": "",
        "class": None,
        "class_index": None,
        "seed": 1,
        "image_index": 0,
        "steps": 2,
        "queue_ms": 0,
        "compute_ms": 0,
    }
    timing = {
        "images_ahead": 0,
        "predicted_wait_s": predicted_wait_s,
        "wait_s": wait_s,
        "predicted_finish_s": 2.0,
        "finish_s": 2.0,
    }
    body = {"model": "m", "images": [image] * images, "numerics_id": "0123456789abcdef", "timing": timing}
    return httpx.Response(200, json=body)


def refusal(status: int, title: str) -> httpx.Response:
    return httpx.Response(status, json={"type": "about:blank", "title": title, "status": status, "detail": "no"})


def put(handler: Any, load: Load, watch: Callable[[Recorder, float], object] = lambda recorder, at: None) -> Report:
    """Put a stand-in service under a load."""

    async def run() -> Report:
        client = AsyncClient(
            "http://service", patience_s=0, max_connections=None, transport=httpx.MockTransport(handler)
        )
        async with client:
            return await run_load(
                client, load, url="http://service", models=[MODEL], alone_s={"defaults": 0.5}, watch=watch
            )

    return run_async(run())


def a_load(**changes: Any) -> Load:
    return Load(**{"kinds": DEFAULT_MIXTURE, "duration_s": 0.1, "seed": 1, "rate": 100.0, **changes})


# --- when requests are sent


def test_the_open_loop_keeps_its_schedule_while_no_request_is_answered() -> None:
    load = a_load(duration_s=0.2)
    planned = [*poisson_times(100.0, 0.2, random.Random(1))]
    all_sent = asyncio.Event()
    sent: list[httpx.Request] = []

    async def hold(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        if len(sent) == len(planned):
            all_sent.set()
        await all_sent.wait()  # forever, if a request waited for the answer of another one
        return answer()

    report = put(hold, load)
    assert len(planned) > 10
    assert [record.due_s for record in report.requests] == pytest.approx(planned, abs=1e-6)
    assert report.all.answered == len(planned)
    assert all(record.sent_s >= record.due_s for record in report.requests)


def test_latency_counts_from_the_planned_time_if_the_generator_is_held_up() -> None:
    held_up: list[bool] = []

    def hold_up_once(request: httpx.Request) -> httpx.Response:
        if not held_up:
            held_up.append(True)
            time.sleep(0.5)  # the event loop, and with it the generator, stands still
        return answer()

    first, *others = put(hold_up_once, a_load(duration_s=0.2)).requests
    assert len(others) > 5
    for record in others:
        assert record.latency_s >= first.due_s + 0.5 - record.due_s
        assert record.sent_s - record.due_s > 0.25


def test_the_closed_loop_keeps_a_number_of_requests_in_flight() -> None:
    in_flight, seen = 0, []

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight
        in_flight += 1
        seen.append(in_flight)
        await asyncio.sleep(0.005)
        in_flight -= 1
        return answer()

    report = put(serve, a_load(rate=None, concurrency=3))
    assert max(seen) == 3
    assert report.all.answered == len(seen) > 6
    assert (report.rate, report.concurrency) == (None, 3)


def test_a_client_of_the_closed_loop_pauses_after_a_failure() -> None:
    times = iter([0.0, 0.5, 2.0])  # the third is after the end
    pauses: list[float] = []

    async def fail(number: int, due_s: float) -> bool:
        pauses.append(time.monotonic())
        return False

    run_async(closed_loop(1, 1.0, fail, lambda: next(times)))
    assert pauses[1] - pauses[0] >= 0.09


def test_poisson_times_have_the_mean_and_spread_of_the_process() -> None:
    times = [*poisson_times(20.0, 500.0, random.Random(3))]
    gaps = [after - before for before, after in pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)
    assert times == [*poisson_times(20.0, 500.0, random.Random(3))]


def test_ctrl_c_ends_a_load_and_reports_what_was_measured() -> None:
    first = True

    async def answer_once(request: httpx.Request) -> httpx.Response:
        nonlocal first
        if not first:
            await asyncio.sleep(3600)
        first = False
        return answer()

    def interrupt(recorder: Recorder, at_s: float) -> None:
        if recorder.records and recorder.in_flight:
            signal.raise_signal(signal.SIGINT)

    report = put(answer_once, a_load(duration_s=3600.0), interrupt)
    assert report.ended_early
    assert (report.all.answered, report.all.failed) == (1, 0)
    assert report.all.unfinished == report.all.requests - 1 > 0
    assert report.all.latency_s is not None
    assert report.all.latency_s.max < report.elapsed_s < 3600
    assert "ended early" in report_text(report)


# --- what is asked for


def test_a_mixture_is_read_from_texts_and_files(tmp_path: Path) -> None:
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([{"name": "sections", "respacing": "10,10", "weight": 0.5}, {"class": ["Bag", 3]}]))
    kinds = read_mixture(["steps=50,n=4,class=Ankle boot,weight=3", str(file)])
    assert [(kind.name, kind.weight, kind.fields) for kind in kinds] == [
        ("steps=50,n=4,class=Ankle boot", 3.0, {"steps": 50, "n": 4, "class": "Ankle boot"}),
        ("sections", 0.5, {"respacing": "10,10"}),
        ('class=["Bag", 3]', 1.0, {"class": ["Bag", 3]}),
    ]
    assert read_mixture([]) == DEFAULT_MIXTURE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("50", "mix: must be a JSON file that exists, or NAME=VALUE,... .*; got '50'"),
        ("steps=1", "mix: 'steps=1': steps: .*greater than or equal to 2"),
        ("stepz=3", "stepz: is unknown; must be name, weight, .*steps"),
        ("weight=0", "weight: must be a number above 0; got 0"),
        ("weight=NaN", "weight: must be a number above 0; got nan"),
        ("name=3", "name: must be a text; got 3"),
        ("stream=true", "stream: must be left out"),
        ("steps=3", "two kinds of requests are called 'steps=3'"),
    ],
)
def test_an_invalid_mixture_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mixture(["steps=3", text])


@pytest.mark.parametrize("content", ["{}", "[]", "[1]", "not JSON"])
def test_an_invalid_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mix.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"must hold a list of objects|is not JSON"):
        read_mixture([str(file)])


def test_a_request_depends_on_its_number_and_the_seed_only() -> None:
    kinds = read_mixture(["steps=10,weight=3", "steps=20,seed=5"])
    drawn = [draw_request(kinds, 7, number) for number in range(2000)]
    assert drawn == [draw_request(kinds, 7, number) for number in range(2000)]
    assert Counter(kind.name for kind, _ in drawn)["steps=10"] == pytest.approx(1500, rel=0.05)
    assert len({fields["seed"] for kind, fields in drawn if kind.name == "steps=10"}) > 1400
    assert {fields["seed"] for kind, fields in drawn if kind.name != "steps=10"} == {5}


def test_a_kind_that_the_service_refuses_is_found_before_the_load() -> None:
    async def run() -> None:
        transport = httpx.MockTransport(lambda request: refusal(422, "Invalid request"))
        async with AsyncClient("http://service", transport=transport) as client:
            await try_kinds(client, read_mixture(["steps=50"]))

    with pytest.raises(TrialFailed, match="mix: steps=50: Invalid request: no"):
        run_async(run())


# --- the report


def record(kind: str = "a", *, due: float = 0.0, latency: float = 1.0, **changes: Any) -> RequestRecord:
    known = {"kind": kind, "due_s": due, "sent_s": due, "ended_s": due + latency, "outcome": "answered"}
    return RequestRecord(**{**known, **changes})


def test_percentiles_of_known_values() -> None:
    values = [float(value) for value in random.Random(1).sample(range(1, 101), 100)]
    assert Percentiles.of(values) == Percentiles(mean=50.5, p50=50, p95=95, p99=99, max=100)
    assert Percentiles.of([3.0]) == Percentiles(mean=3, p50=3, p95=3, p99=3, max=3)
    assert Percentiles.of([]) is None
    assert percentile([1, 2, 3, 4], 0.5) == 2


def test_a_group_counts_answers_and_compares_predictions() -> None:
    def timing(predicted_wait_s: float, wait_s: float) -> Timing:
        return Timing(
            images_ahead=0, predicted_wait_s=predicted_wait_s, wait_s=wait_s, predicted_finish_s=3, finish_s=4
        )

    group = Group.of(
        [
            record(latency=1.0, images=2, timing=timing(1.0, 3.0)),
            record(latency=3.0, images=4, timing=timing(2.0, 1.0)),
            record(latency=99.0, outcome="failed", status=503),
            record(latency=99.0, outcome="unfinished"),
        ],
        elapsed_s=4.0,
    )
    assert (group.requests, group.answered, group.failed, group.unfinished) == (4, 2, 1, 1)
    assert (group.images, group.images_per_s) == (6, 1.5)
    assert group.latency_s is not None
    assert group.wait is not None
    assert group.finish is not None
    assert (group.latency_s.p50, group.latency_s.max) == (1.0, 3.0)
    assert (group.wait.real_s.max, group.wait.predicted_s.max, group.wait.error_s.max) == (3.0, 2.0, 2.0)
    assert (group.wait.bias_s, group.finish.bias_s) == (-0.5, -1.0)


def test_failures_are_counted_by_status_and_reason() -> None:
    outcomes: list[httpx.Response | Exception] = [
        refusal(503, "Queue full"),
        refusal(503, "Queue full"),
        refusal(429, "Too many requests"),
        httpx.Response(502, text="<html>Bad gateway</html>"),
        httpx.ConnectError("refused"),
    ]

    def serve(request: httpx.Request) -> httpx.Response:
        outcome: httpx.Response | Exception = outcomes.pop() if outcomes else answer()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    report = put(serve, a_load(duration_s=0.3))
    assert report.all.failed == 5
    assert report.all.answered == report.all.requests - 5 > 0
    assert report.failures[0].model_dump() == {"status": 503, "reason": "Queue full", "count": 2}
    assert {(failure.status, failure.count) for failure in report.failures} == {(503, 2), (429, 1), (502, 1), (None, 1)}
    assert "503          2  Queue full" in report_text(report).splitlines()


def test_failures_of_no_request() -> None:
    assert count_failures([record()]) == []


def test_the_fields_of_the_json_file() -> None:
    """A field that changes its meaning, or goes, needs another `format`."""
    schema = Report.model_json_schema()
    fields = {name: " ".join(part["properties"]) for name, part in schema["$defs"].items()}
    group = "requests answered failed unfinished images images_per_s alone_s latency_s wait finish"
    assert " ".join(schema["properties"]) == (
        "format version url started models rate concurrency duration_s seed elapsed_s ended_early late_s failures all "
        "kinds requests"
    )
    assert fields == {
        "FailureCount": "status reason count",
        "Group": group,
        "KindReport": f"{group} name weight fields",
        "Percentiles": "mean p50 p95 p99 max",
        "Prediction": "real_s predicted_s error_s bias_s",
        "RequestRecord": "kind due_s sent_s ended_s outcome status error images timing",
        "ServedBy": "name backend numerics_id",
        "Timing": "images_ahead predicted_wait_s wait_s predicted_finish_s finish_s",
    }
    report = put(lambda request: answer(), a_load())
    assert report.format == "iddpm-bench-1"
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_results_are_shown_by_kind_and_together() -> None:
    kinds = (
        RequestKind(name="small", weight=1.0, fields={"steps": 2}),
        RequestKind(name="large", weight=1.0, fields={"steps": 3, "n": 2}),
    )
    report = put(lambda request: answer(json.loads(request.content).get("n", 1)), a_load(kinds=kinds))
    text = report_text(report)
    small, large, together = (text.splitlines()[line].split() for line in (4, 5, 6))
    assert [small[0], large[0], together[0]] == ["small", "large", "all"]
    assert int(small[1]) + int(large[1]) == int(together[1]) == report.all.requests
    assert "wait, predicted             0.500" in text
    assert report.all.images == int(small[2]) + 2 * int(large[2])


def test_a_generator_that_is_late_says_so() -> None:
    report = put(lambda request: answer(), a_load())
    late = Percentiles(mean=0.1, p50=0.1, p95=0.2, p99=0.25, max=0.3)
    assert "Requests were sent late (p99 0.250 s)" in report_text(report.model_copy(update={"late_s": late}))


def test_the_live_line_fits_a_terminal() -> None:
    async def run() -> str:
        transport = httpx.MockTransport(lambda request: answer())
        async with AsyncClient("http://service", transport=transport) as client:
            recorder = Recorder(client, DEFAULT_MIXTURE, 1, lambda: 12345.0)
            for number in range(3):
                await recorder.send(number, 12344.0)
            return live_line(recorder, 12345.6, 86400)

    line = run_async(run())
    assert line == "12346/86400 s: 3 answered, 0 in flight, 0 failed, p50 1.00, p99 1.00 s"


class Unread(list[RequestRecord]):
    """Records that must not be gone through."""

    def __iter__(self) -> Iterator[RequestRecord]:
        raise AssertionError


def test_the_live_line_looks_at_the_latest_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "LATEST", 2)
    answers = iter([answer(), refusal(503, "Queue full"), answer(), answer()])

    async def run() -> str:
        transport = httpx.MockTransport(lambda request: next(answers))
        async with AsyncClient("http://service", patience_s=0, transport=transport) as client:
            recorder = Recorder(client, DEFAULT_MIXTURE, 1, lambda: 100.0)
            recorder.records = Unread()
            for number in range(4):
                await recorder.send(number, 100.0 * (number > 0))
            return live_line(recorder, 100.0, 200)

    assert run_async(run()) == "100/200 s: 3 answered, 0 in flight, 1 failed, p50 0.00, p99 0.00 s"


def test_without_a_terminal_nothing_is_counted_for_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with live_progress(10) as watch:
        watch(cast("Recorder", None), 1.0)


@pytest.mark.parametrize("answered", [True, False])
def test_a_plot_is_drawn_of_any_report(answered: bool) -> None:
    report = put(lambda request: answer() if answered else refusal(503, "Queue full"), a_load())
    assert latency_plot(report).startswith(b"\x89PNG")
