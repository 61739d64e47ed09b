"""The timing benchmarks, with counted calls and fake clocks: no test here depends on speed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bookkeeping, bulk, denoise_step, http, precision, sample, thread_or_process
from benchmarks.ceiling import Probe, ceilings, probes
from benchmarks.contenders import (
    Absent,
    EagerUNet,
    Entry,
    Place,
    Rows,
    open_contender,
    reference_output,
    relative_error,
)
from benchmarks.denoise_step import Absence, Cell, Outcome
from benchmarks.engine_process import run_engine
from benchmarks.engine_sampler import EngineSampler
from benchmarks.networks import NETWORKS, RANDOM_NETWORKS, BenchNetwork, count_flops, open_network, random_network
from benchmarks.rounds import Pace, Timing, take_turns
from diffusion.config import CheckpointConfig, DiffusionConfig, ModelConfig
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from formats.artifact import read_artifact
from model_export.parity import LIMITS
from service.backends.base import BackendOptions
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import ImageStatus
from service.metrics import Metrics
from tests import bfloat16
from tests.counts import LONG
from tests.exports import Exports
from tests.fakes import CountingRunner, generation, params, tiny_checkpoint
from tests.paths import ROOT
from tests.waiting import TEST_LIMIT_S, until

PLACE = Place(device=torch.device("cpu"), threads=1)
CONFIG = CheckpointConfig(
    model=ModelConfig(
        image_size=8,
        image_channels=1,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_heads=2,
        num_classes=3,
        null_class=True,
    ),
    diffusion=DiffusionConfig(num_timesteps=100),
)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> BenchNetwork:
    return random_network("tiny", CONFIG, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def exported(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> BenchNetwork:
    """Return a network that has an artifact: to trace one takes most of the time here."""
    return BenchNetwork("golden", exports.checkpoint(), tmp_path_factory.mktemp("golden"), trained=True)


# --- turns


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def work(self, name: str, seconds: float) -> None:
        self.order.append(name)
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def turns(pace: Pace, **seconds: float) -> tuple[FakeClock, dict[str, Timing]]:
    clock = FakeClock()
    calls = {name: lambda name=name, s=s: clock.work(name, s) for name, s in seconds.items()}
    return clock, take_turns(calls, pace, clock=lambda: clock.now, sleep=clock.sleep)


def test_contenders_take_turns_and_each_round_begins_with_another_one() -> None:
    clock, timings = turns(Pace(rounds=3, max_seconds=100, warm_up_calls=1), a=1, b=2)
    assert clock.order == [*"ab", *"ab", *"ba", *"ab"]
    assert timings["a"].seconds == pytest.approx((1, 1, 1))
    assert timings["b"].seconds == pytest.approx((2, 2, 2))


def test_only_quick_contenders_settle_before_each_timed_call() -> None:
    clock, timings = turns(Pace(rounds=1, max_seconds=100), quick=0.1, slow=1)
    assert clock.order == ["quick", "quick", "slow", "slow", "quick", "quick", "slow"]
    assert len(timings["quick"].seconds) == 1


def test_the_time_limit_ends_the_rounds_after_the_first_three() -> None:
    assert len(turns(Pace(rounds=9, max_seconds=1), a=1)[1]["a"].seconds) == 3
    assert len(turns(Pace(rounds=9, max_seconds=4.5), a=1)[1]["a"].seconds) == 5
    assert len(turns(Pace(rounds=2, max_seconds=0), a=1)[1]["a"].seconds) == 2


def test_a_timing_has_a_median_and_a_spread() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.best, timing.median, timing.quartiles) == (1, 3, (2, 4))


# --- networks


def test_the_networks_have_their_documented_sizes(tmp_path: Path) -> None:
    model = RANDOM_NETWORKS["c64"]().model
    assert count_flops(model) == 3_255_500_800
    bundled = open_network("fashion32", tmp_path)
    assert (bundled.parameters, bundled.trained) == (1_905_890, True)
    assert set(NETWORKS) == {"fashion32", *RANDOM_NETWORKS}
    with pytest.raises(ValueError, match="network must be one of fashion32, c64"):
        open_network("c65", tmp_path)


def test_a_random_network_is_written_once_and_leaves_no_output_at_zero(network: BenchNetwork) -> None:
    weights = network.checkpoint / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = random_network("tiny", CONFIG, network.work.parent)
    assert weights.stat().st_mtime_ns == before
    out = reference_output(again, Rows.make(CONFIG, 2))
    assert 0.01 < np.abs(out).mean() < 100


def test_another_configuration_replaces_the_network(tmp_path: Path) -> None:
    random_network("n", CONFIG, tmp_path)
    changed = CONFIG.replace(model=CONFIG.model.replace(num_res_blocks=2))
    assert random_network("n", changed, tmp_path).config.model.num_res_blocks == 2


@pytest.mark.skipif(not LONG, reason="traces a graph: IDDPM_TEST_LONG=1")
def test_the_artifact_for_timing_reports_what_was_measured(network: BenchNetwork) -> None:
    manifest = read_artifact(network.artifact())
    assert manifest.checkpoint.provenance["weights"] == "random weights, for timing only"
    in_bf16 = set() if bfloat16.why_not_in_openvino() else {("openvino", "bf16")}
    assert {(p.backend.split()[0], p.precision) for p in manifest.parity} == {
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
        *in_bf16,
    }
    assert all(p.limit >= p.worst and len(p.bands) == 5 for p in manifest.parity)


# --- contenders


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("torch:fp32", LIMITS["fp32"]),
        ("eager:fp32", LIMITS["fp32"]),
        ("onnxruntime:fp32", LIMITS["fp32"]),
        ("openvino:fp32", LIMITS["fp32"]),
        ("diffusers:fp32", LIMITS["fp32"]),
        ("torch:bf16", 0.1),
        ("eager:bf16", 0.1),
        ("diffusers:bf16", 0.1),
    ],
)
def test_every_contender_computes_the_same_network(exported: BenchNetwork, text: str, tolerance: float) -> None:
    rows = Rows.make(exported.config, 3)
    out = open_contender(Entry.parse(text), exported, rows, PLACE)()
    assert tuple(out.shape) == (3, 6, 8, 8)
    assert relative_error(out, reference_output(exported, rows)) < tolerance


def test_a_row_is_equal_in_every_batch() -> None:
    few, many = Rows.make(CONFIG, 2), Rows.make(CONFIG, 5)
    np.testing.assert_array_equal(few.x_t, many.x_t[:2])
    np.testing.assert_array_equal(few.t, many.t[:2])
    assert len(set(many.t)) == 5


@pytest.mark.parametrize("text", ["torch", "keras:fp32", "openvino:int8", "openvino:auto"])
def test_an_unknown_contender_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a contender is KIND:PRECISION"):
        Entry.parse(text)


@pytest.mark.parametrize("text", ["onnxruntime:bf16", "openvino:fp16", "torch:fp16", "eager:fp16", "diffusers:fp16"])
def test_contenders_that_the_cpu_does_not_support_are_absent(network: BenchNetwork, text: str) -> None:
    with pytest.raises(Absent, match="fp"):
        open_contender(Entry.parse(text), network, Rows.make(CONFIG, 1), PLACE)


def test_a_network_without_a_diffusers_form_is_absent_with_the_reason(tmp_path: Path) -> None:
    model = CONFIG.model.replace(channel_mult=(1, 2, 3), attention_resolutions=(4, 2))
    unmapped = random_network("n", CONFIG.replace(model=model), tmp_path)
    with pytest.raises(Absent, match="attention_head_dim is one number for all levels"):
        open_contender(Entry.parse("diffusers:fp32"), unmapped, Rows.make(CONFIG, 1), PLACE)


def test_a_backend_compiles_only_the_given_sizes(exported: BenchNetwork) -> None:
    assert BackendOptions(max_rows=6).sizes_to_compile == (1, 2, 4, 6)
    from service.backends.openvino_backend import OpenVinoBackend

    options = BackendOptions(max_rows=3, batch_sizes=(3,), device="cpu", precision="fp32", threads=1, cache_dir="")
    assert OpenVinoBackend(exported.artifact(), options).batch_sizes == (3,)
    assert TorchBackend(exported.checkpoint, options).batch_sizes is None


# --- ceiling


def test_the_ceiling_is_the_best_probe_of_each_precision() -> None:
    made = [
        Probe("a", "fp32", 100, lambda: None),
        Probe("b", "fp32", 100, lambda: None),
        Probe("c", "bf16", 100, lambda: None),
    ]
    timings = {"a": Timing((2.0,)), "b": Timing((1.0,)), "c": Timing((0.5,))}
    assert ceilings(made, timings) == {"fp32": 100, "bf16": 200}


def test_all_probes_compute_the_same_number_of_convolutions() -> None:
    torch_probe, *openvino_probes = probes({"fp32"}, Place(device=torch.device("cpu"), threads=2))
    assert tuple(torch_probe.call().shape) == (8, 256, 32, 32)
    assert [len(probe.call()) for probe in openvino_probes] == [1, 2]
    for probe in openvino_probes:
        assert probe.flops == torch_probe.flops == 4 * 2 * 8 * 32 * 32 * 256 * 256 * 9
        assert np.concatenate(probe.call()).shape == (8, 256, 32, 32)


# --- reports


def _cell(contender: str, rows: int, seconds: float, row_0: str = "x") -> Cell:
    return Cell(
        network="tiny",
        rows=rows,
        contender=contender,
        flops=rows * 1000,
        timing=Timing((seconds,)),
        ceiling=4000,
        error=1e-6,
        row_0=row_0,
    )


def test_the_knee_is_where_more_rows_gain_little() -> None:
    assert denoise_step.knee([_cell("a", 1, 1.0), _cell("a", 2, 1.2), _cell("a", 4, 2.0), _cell("a", 8, 3.9)]) == 4
    assert denoise_step.knee([_cell("a", 1, 1.0), _cell("a", 2, 2.0)]) == 1


def test_batches_that_are_not_bit_identical_are_listed() -> None:
    assert denoise_step.equal_bits([_cell("a", 1, 1, "y"), _cell("a", 2, 1), _cell("a", 4, 1)]) == "all but 1"
    assert denoise_step.equal_bits([_cell("a", 1, 1), _cell("a", 2, 1)]) == "all"


def test_the_section_has_every_number_and_every_absence(network: BenchNetwork, tmp_path: Path) -> None:
    outcomes: list[Outcome] = [
        _cell("openvino:fp32", 1, 0.5),
        _cell("openvino:fp32", 2, 0.5),
        Absence("tiny", 1, "diffusers:fp32", "no such thing"),
        Absence("tiny", 2, "diffusers:fp32", "no such thing"),
    ]
    denoise_step.write_results(tmp_path, {"Machine": "small"}, [network], outcomes, [])
    text = (tmp_path / "denoise_step.md").read_text()
    assert "- Machine: small" in text
    assert "| openvino:fp32 | 2.0 (50 %) | 4.0 (100 %) | 2 | all |" in text
    assert "- diffusers:fp32 took no part (batch 1, 2): no such thing" in text
    raw = json.loads((tmp_path / "denoise_step.json").read_text())
    assert raw["outcomes"][1]["timing"]["seconds"] == [0.5]


def test_measuring_gives_a_cell_for_each_participant(network: BenchNetwork) -> None:
    entries = [Entry.parse("torch:fp32"), Entry.parse("torch:fp16")]
    pace = Pace(rounds=1, max_seconds=1, warm_up_calls=0, pause=0)
    (cell, absence), probed = denoise_step.measure(network, 2, entries, PLACE, pace)
    assert isinstance(cell, Cell)
    assert (cell.rows, cell.flops, len(cell.timing.seconds)) == (2, 2 * network.flops, 1)
    assert isinstance(absence, Absence)
    assert "fp16" in absence.reason
    assert set(probed) == {"convolution torch fp32", "convolution openvino fp32"}


# --- complete images


def test_the_engine_sampler_gives_the_pixels_of_the_reference_loop(network: BenchNetwork) -> None:
    denoiser = TorchBackend(network.checkpoint, BackendOptions(max_rows=2, device="cpu"))
    finished: list[int] = []
    pixels = EngineSampler(denoiser, 2)(3, [0, 1, 2], on_image=lambda: finished.append(1))
    plan = build_plan(CONFIG.diffusion, "ancestral", "3")
    unet = EagerUNet(Entry.parse("eager:fp32"), network, PLACE)
    expected = [sample_images(unet, plan, [ImageSpec(seed=k, class_index=k)])[0] for k in range(3)]
    np.testing.assert_array_equal(pixels, expected)
    assert len(finished) == 3


@pytest.mark.parametrize("text", ["eager:fp32", "torch:fp32", "openvino:fp32", "diffusers:fp32"])
def test_every_sampler_gives_images(exported: BenchNetwork, text: str) -> None:
    pixels = sample.open_sampler(Entry.parse(text), exported, PLACE, width=2)(3, 3)
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8, 3), np.uint8)
    assert pixels.std() > 1


def test_distances_count_levels() -> None:
    reference = np.zeros((2, 1, 2, 1), dtype=np.uint8)
    pixels = np.array([[[[0], [0]]], [[[3], [255]]]], dtype=np.uint8)
    distance = precision.Distance.between(pixels, reference)
    assert distance.beyond == (0.5, 0.5, 0.25, 0.25)
    assert distance.identical == 1
    assert distance.psnr_db == pytest.approx(10 * np.log10(255**2 / ((9 + 255**2) / 4)))
    assert precision.Distance.between(reference, reference).psnr_db is None


def test_precision_needs_an_existing_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; python -m benchmarks\.conditioning trains one"):
        precision.open_judge(tmp_path / "judge.safetensors", open_network("fashion32", tmp_path))


# --- the engine's own costs


def test_bookkeeping_times_the_steps_of_each_policy_and_the_calls_between_them() -> None:
    costs = bookkeeping.measure(waiting=40, width=4, steps=60, repeats=2)
    assert {policy for policy, _ in costs} == {"fifo", "srw", "deadline"}
    for (_, call), repeats in costs.items():
        assert len(repeats) == 2
        for seconds in repeats:
            assert len(seconds) == 60 if call != "submit" else 0 < len(seconds) < 60
    lines = bookkeeping.table(costs, step_s=0.01).splitlines()
    assert len(lines) == 2 + 3 * 3
    assert lines[2].startswith("| fifo | step |")
    assert lines[2].endswith("% |")


# --- thread or process


def test_the_engine_answers_over_a_pipe_and_ends_on_request() -> None:
    ours, theirs = Pipe()
    engine = threading.Thread(
        target=run_engine, args=(lambda: Engine({"m": CountingRunner()}, EngineConfig(), Metrics()), theirs)
    )
    engine.start()
    assert ours.recv() == []  # warm
    ours.send((generation("r", params(steps=3)), 0.0))
    (result,) = ours.recv()
    assert (result.request_id, result.status, int(result.pixels[0, 0, 0])) == ("r", ImageStatus.DONE, 3)
    ours.send(None)
    engine.join()


def test_a_step_takes_at_least_the_time_of_its_device() -> None:
    load = thread_or_process.Load("sleeps", step_ms=20, busy=0.1, place="thread")
    run = asyncio.run(thread_or_process.measure(load, rate=1.0, switch_interval=0.001))
    assert run.step_ms >= 20
    assert run.hand_over_ms > 0
    runs = {
        thread_or_process.Load("sleeps", 20, 0.1, place): [thread_or_process.Run(21.0 + k, 0.5) for k in range(3)]
        for place in ("thread", "thread, interval", "process")
    }
    table = thread_or_process.table(runs).splitlines()
    assert table[2] == "| sleeps, 20 ms | 10% |" + " 22.0 (21.0-23.0) |" * 3 + " 0.5 |" * 3


def test_benchmarks_start_without_the_cpu_runtimes() -> None:
    """They are too large to install on some GPU machines."""
    block = "import sys; sys.modules['openvino'] = sys.modules['onnxruntime'] = None"
    load = "import benchmarks.denoise_step, benchmarks.sample, benchmarks.update_kernel"
    subprocess.run([sys.executable, "-c", f"{block}; {load}"], check=True, cwd=ROOT, timeout=TEST_LIMIT_S)


# --- HTTP


def test_a_server_is_started_called_and_stopped(tmp_path: Path) -> None:
    (contender,) = (one for one in http.contenders(None) if one.name == "FastAPI alone")
    measured = asyncio.run(http.measure(contender, tmp_path / "log", alone=3, clients=[1, 2], seconds=0.1))
    assert len(measured.alone_ms) == 3
    assert list(measured.loaded) == [1, 2]
    assert all(len(loaded.ms) >= clients and loaded.cpu_ms >= 0 for clients, loaded in measured.loaded.items())
    assert measured.engine_ms == 0
    other = http.Measured((3.0, 3.0), 1.0, {4: http.Loaded(100.0, (5.0,), 2.5, ())})
    alone, loaded = http.tables({"a": [measured], "b": [other]}).split("\n\n")
    assert alone.splitlines()[3] == "| b | 3.00 (3.00-3.00) | 2.00 (2.00-2.00) | 2.00 (2.00-2.00) |"
    assert loaded.splitlines()[4] == (
        "| b | 4 | 100 (100-100) | 5.00 (5.00-5.00) | 5.00 (5.00-5.00) | 2.50 (2.50-2.50) | - |"
    )


def test_the_processor_time_of_a_server_is_that_of_all_its_processes() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass\n"
    program = f"import subprocess, sys\n{burn}child = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
    waiting = f"{burn}input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}input()", waiting], start_new_session=True, stdin=subprocess.PIPE
    ) as server:
        try:
            until(lambda: http.session_cpu_seconds(server.pid) > 0.3)  # more than one process needs
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_generating_into_files_is_compared_with_the_engine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.bulk.WORK", tmp_path)
    monkeypatch.setenv("IDDPM_MAX_ROWS", "2")
    model = tiny_checkpoint(tmp_path / "model")
    options = ["--images", "3", "--steps", "2", "--rounds", "1", "--shard-size", "2", "--formats", "npz", "--worker"]
    bulk.report(bulk.parse_arguments([str(model), *options, "--out", str(tmp_path)]))
    lines = (tmp_path / "bulk.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("| the engine alone |") and "100.0 %" in line for line in lines)
    for name in ("iddpm generate --format npz", "a worker of deploy.ray.bulk, without Ray"):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bulk.md", "model"]
