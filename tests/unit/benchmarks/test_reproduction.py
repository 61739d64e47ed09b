"""The reproduction of the paper at toy size: plan of the runs, training, cells and report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from benchmarks import reproduction_cells, reproduction_report
from benchmarks.judge import Judge
from benchmarks.reproduction import DOCUMENT, parse_arguments
from benchmarks.reproduction_cells import (
    EXTRA,
    FULL,
    Cell,
    Evaluation,
    Options,
    final_cells,
    possible_cells,
    width_cells,
)
from benchmarks.reproduction_claims import Verdict, claims, judge_claim
from benchmarks.reproduction_curves import WINDOW, curves_of
from benchmarks.reproduction_report import write_report
from benchmarks.reproduction_runs import is_finished, planned_runs, train_runs
from trainer.config import TrainConfig
from trainer.evaluation.folder import EvaluationStopped
from trainer.presets import preset

TOY = {
    "model.image_size": 8,
    "model.model_channels": 8,
    "model.channel_mult": [1],
    "diffusion.num_timesteps": 8,
    "preview_steps": 8,
    "total_images": 8,
    "batch_size": 4,
    "microbatch_size": 2,
    "log_every_batches": 1,
    "checkpoint_every_images": 4,
}
OPTIONS = Options(
    steps=(4, FULL), nll_images=2, frechet_images=3, noise_batches=2, noise_small=1, noise_big=2, noise_history=1
)
HYBRID, SIMPLE = "hybrid-cosine-0", "simple-cosine-0"


def _configs() -> dict[str, TrainConfig]:
    return {run.name: preset("fashion32").with_overrides(dict(run.settings)) for run in planned_runs()}


def test_the_plan_holds_every_run_once_with_valid_settings() -> None:
    configs = _configs()
    assert len(planned_runs()) == len(configs) == 20
    assert list(configs)[:3] == ["hybrid-cosine-0", "simple-cosine-0", "vlb-cosine-0"]
    assert list(configs)[6:11] == ["vlbuniform-cosine-0", "width8-0", "width12-0", "width24-0", "hybrid-cosine-1"]
    assert {name: config.seed for name, config in configs.items()} == {name: int(name[-1]) for name in configs}
    assert configs["vlb-linear-1"].timestep_sampler == "loss_second_moment"
    assert configs["vlbuniform-cosine-0"].timestep_sampler == "uniform"
    assert configs["simple-linear-0"].diffusion.variance == "fixed_small"
    assert configs["width24-1"].model.model_channels == 24


def test_the_runs_differ_in_what_is_compared_only() -> None:
    configs = _configs()
    changed = configs["hybrid-cosine-0"].differences(configs["width12-0"])
    assert list(changed) == ["model.model_channels"]
    changed = configs["hybrid-cosine-0"].differences(configs["hybrid-linear-0"])
    assert list(changed) == ["diffusion.noise_schedule"]


def test_every_cell_of_a_claim_is_measured() -> None:
    cells = {cell.file_name for cell in final_cells(Options())}
    for claim in claims():
        for seed in (0, 1):
            assert {claim.lower(seed).file_name, claim.higher(seed).file_name} <= cells, claim.text


@pytest.fixture
def looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, tuple[Cell, str]]]:
    """The tables of a report whose every value is a number of its own, and what each number stands for."""
    numbers: dict[tuple[Cell, str], float] = {}

    class Content(dict[str, Any]):
        def __init__(self, cell: Cell) -> None:
            super().__init__(points=[])
            self._cell = cell

        def get(self, field: str, default: object = None) -> float:
            return numbers.setdefault((self._cell, field), 1000.0 + len(numbers))

    monkeypatch.setattr(reproduction_report, "read_cell", lambda _, cell: Content(cell))
    write_report(tmp_path, tmp_path / "docs" / "reproduction.md")
    text = _tables((tmp_path / "docs" / "reproduction.md").read_text())
    return text, {str(int(number)): key for key, number in numbers.items()}


def _tables(document: str) -> str:
    return document.partition("## Tables 1 and 2")[2]


def test_every_cell_of_the_report_is_measured(looked_up: tuple[str, dict[str, tuple[Cell, str]]]) -> None:
    planned = final_cells(Options())
    assert {cell for cell, _ in looked_up[1].values()} <= set(planned)


def test_the_document_names_every_ordering_and_agrees_with_its_own_tables(
    looked_up: tuple[str, dict[str, tuple[Cell, str]]],
) -> None:
    text = DOCUMENT.read_text()
    places, found = (re.findall(r"(?<=[ |])(?:\d+\.\d+|-(?=,| \|))", part) for part in (looked_up[0], _tables(text)))
    values = {
        looked_up[1][place.partition(".")[0]]: None if number == "-" else float(number)
        for place, number in zip(places, found, strict=True)
        if place != "-"
    }
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (figure|.*tables) \d", line)]
    assert [row[:2] for row in rows] == [[claim.source, claim.text] for claim in claims()]
    for claim, (_, name, ratios, interval, result) in zip(claims(), rows, strict=True):
        verdict = judge_claim(claim, lambda cell, field: values[cell, field])
        assert result == verdict.text, name
        assert [float(ratio) for ratio in ratios.split(", ")] == pytest.approx(verdict.ratios, rel=5e-3, abs=1e-3), name
        low, high = (float(end) for end in interval.split(" to "))
        if low > 0.05:
            assert math.sqrt(low * high) == pytest.approx(np.prod(verdict.ratios) ** 0.5, rel=1e-2), name


def test_cells_have_names_of_their_own() -> None:
    cells = final_cells(Options())
    assert len({cell.file_name for cell in cells}) == len(cells)


def test_a_claim_is_judged_by_seed() -> None:
    claim = claims()[0]
    values = {claim.lower(0): 3.0, claim.higher(0): 4.0, claim.lower(1): 5.0}
    one = judge_claim(claim, lambda cell, _: values.get(cell))
    assert (one.ratios, one.text, one.interval) == ((0.75,), "held (one seed)", None)
    values[claim.higher(1)] = 4.0
    both = judge_claim(claim, lambda cell, _: values.get(cell))
    assert both.ratios == (0.75, 1.25)
    assert both.text == "**mixed**: held for 1 of 2 seeds"
    assert judge_claim(claim, lambda *_: None).text == "not run yet"


def test_the_interval_over_seeds_is_students() -> None:
    assert Verdict((0.5, 0.5), 2).interval == pytest.approx((0.5, 0.5))
    low, high = Verdict((math.exp(-1), math.exp(1)), 1).interval or (0, 0)
    assert math.log(high) == pytest.approx(12.706) == -math.log(low)  # standard error 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished toy runs, test images and a judge."""
    folder = tmp_path_factory.mktemp("reproduction")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(12) % 3, classes=np.array(["a", "b", "c"]))
    save_file(Judge((1, 8, 8), 3).state_dict(), folder / "judge.safetensors")
    runs = [run for run in planned_runs(TOY) if run.name in {HYBRID, SIMPLE}]
    train_runs(folder / "runs", folder / "images.npz", runs, folder / "cache")
    return folder


def test_a_finished_run_is_not_trained_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = planned_runs(TOY)
    assert [run.name for run in runs if is_finished(folder / "runs", run)] == [HYBRID, SIMPLE]
    before = (folder / "runs" / HYBRID / "metrics.jsonl").stat().st_mtime_ns
    train_runs(folder / "runs", folder / "images.npz", runs[:1], folder / "cache")
    assert (folder / "runs" / HYBRID / "metrics.jsonl").stat().st_mtime_ns == before
    assert f"{HYBRID}: finished" in capsys.readouterr().err


def test_an_unfinished_run_is_resumed(folder: Path) -> None:
    run = planned_runs({**TOY, "total_images": 12})[1]
    assert not is_finished(folder / "runs", run)
    train_runs(folder / "runs", folder / "images.npz", [run], folder / "cache")
    assert is_finished(folder / "runs", run)


def test_cells_of_finished_runs_are_planned_cheap_first(folder: Path) -> None:
    cells = possible_cells(folder / "runs", planned_runs(TOY), OPTIONS)
    assert {cell.run for cell in cells} == {HYBRID, SIMPLE}
    during = [(cell.kind, cell.images_seen) for cell in cells if cell.images_seen is not None]
    assert sorted(during) == [("frechet", 4), ("nll", 4), ("noise", 4)]
    assert [cell.kind for cell in cells[:2]] == ["curves", "nll"]
    assert cells[1].steps == 4
    assert cells[-1].steps == FULL


def _evaluation(folder: Path, out: Path) -> Evaluation:
    out.mkdir(exist_ok=True)
    return Evaluation(
        folder / "runs", folder / "images.npz", folder / "judge.safetensors", out, OPTIONS, cache=folder / "cache"
    )


def test_cells_are_measured_once_and_reported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction_cells, "SAMPLE_BATCH", 2)
    out = tmp_path / "out"
    cells = [
        *(Cell("nll", run) for run in (HYBRID, SIMPLE)),
        Cell("nll", SIMPLE, FULL, "fixed_large"),
        Cell("nll", HYBRID, 4, f"trained{EXTRA}"),
        *(Cell("frechet", HYBRID, 4, variant) for variant in ("trained", "fixed_small", "fixed_large", "ddim")),
        Cell("frechet", HYBRID, FULL, "trained", 4),
        *(Cell("noise", HYBRID, FULL, case) for case in reproduction_cells.NOISE_CASES),
        Cell("curves", HYBRID),
    ]
    _evaluation(folder, out).measure_all(cells)
    assert sorted(path.name for path in out.glob("*.json")) == sorted(cell.file_name for cell in cells)
    found = {cell: json.loads((out / cell.file_name).read_text()) for cell in cells}
    assert found[cells[0]]["bits_per_dim"] > 0
    assert found[cells[3]]["steps_evaluated"] == 5  # 4 of 8 steps, and one below 8 / 4
    distances = [found[cell]["frechet_distance"] for cell in cells[4:8]]
    assert len(set(distances)) == 4
    assert found[cells[8]]["model"]["images_seen"] == 4
    assert found[cells[-2]]["trace"]["value"] is not None
    assert [point["images"] for point in found[cells[-1]]["points"]] == [WINDOW]

    before = (out / cells[0].file_name).stat().st_mtime_ns
    _evaluation(folder, out).measure_all(cells)
    assert (out / cells[0].file_name).stat().st_mtime_ns == before

    document = tmp_path / "docs" / "reproduction.md"
    write_report(out, document)
    text = document.read_text()
    ratio = found[cells[0]]["bits_per_dim"] / found[cells[1]]["bits_per_dim"]
    assert f"| bits/dim, cosine: L_hybrid below L_simple | {ratio:.3f} | - |" in text
    assert "| not run yet |" in text
    assert max(map(len, text.splitlines())) < 160


def test_curves_are_means_over_windows_and_the_second_half(tmp_path: Path) -> None:
    log, step = tmp_path / "metrics.jsonl", WINDOW // 2
    images = (step, WINDOW, WINDOW + step, 2 * WINDOW + 1)  # the last window is not cut
    lines = [{"images": seen, "vb_bpd": bound} for seen, bound in zip(images, (0.3, 0.1, 0.2, 0.4), strict=True)]
    log.write_text("\n".join(map(json.dumps, lines)))
    found = curves_of(log, 10)
    first, second = found["points"]
    assert first == {
        "images": WINDOW, "bits_per_dim": pytest.approx(2.0), "low": pytest.approx(1.2), "high": pytest.approx(2.8),
        "spread": pytest.approx(2**0.5),
    }  # fmt: skip
    assert found["bits_per_dim"] == second["bits_per_dim"] == pytest.approx(3.0)


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for seed in (0, 1):
        run = f"hybrid-cosine-{seed}"
        points = [{"images": k, "bits_per_dim": 4.0 - k, "low": 0.5, "high": 9.0} for k in (1, 2, 3)]
        cells = {Cell("curves", run): {"bits_per_dim": 2.0, "points": points}}
        for seen in (20_000, None):
            noise = {"noise_scale": {"value": 5.0 + seed}, "model": {"images_seen": seen or 60_000}}
            cells[Cell("noise", run, FULL, "hybrid:uniform", seen)] = noise
        for cell, content in cells.items():
            (out / cell.file_name).write_text(json.dumps({**asdict(cell), **content}))
    write_report(out, tmp_path / "reproduction.md")
    text = (tmp_path / "reproduction.md").read_text()
    for name in ("curves", "noise"):
        assert (tmp_path / "images" / f"reproduction_{name}.png").stat().st_size > 1000
        assert f"(images/reproduction_{name}.png)" in text
    assert "| L_hybrid | 2.000, 2.000 | not run yet |" in text
    assert "| L_hybrid | hybrid:uniform | 5.0, 6.0 | not run yet |" in text


def test_an_interrupted_cell_gives_the_same_samples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction_cells, "SAMPLE_BATCH", 2)
    cell = Cell("frechet", HYBRID, 4)
    calls = iter([False, False, True])
    with pytest.raises(EvaluationStopped):
        _evaluation(folder, tmp_path / "stopped").measure_all([cell], lambda: next(calls))
    assert (tmp_path / "stopped" / cell.file_name).with_suffix(".f32").stat().st_size == 2 * 64 * 4
    contents = []
    for name in ("stopped", "whole"):
        _evaluation(folder, tmp_path / name).measure_all([cell])
        contents.append(json.loads((tmp_path / name / cell.file_name).read_text())["frechet_distance"])
    assert contents[0] == contents[1]


def test_the_widths_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for number, name in enumerate(("width12-0", HYBRID)):
        for cell in width_cells(name, None):
            field = "bits_per_dim" if cell.kind == "nll" else "frechet_distance"
            model = {"flops": 1e12 * (number + 1), "parameters": 1000}
            content = {"kind": cell.kind, "run": name, "steps": cell.steps, "variant": cell.variant, "model": model}
            (out / cell.file_name).write_text(json.dumps({**content, field: 2.0 - number / 2}))
    write_report(out, tmp_path / "reproduction.md")
    assert (tmp_path / "images" / "reproduction_widths.png").stat().st_size > 1000
    assert (
        "| figure 10 | bits/dim, equal images: 16 channels below 12 | 0.750 |"
        in (tmp_path / "reproduction.md").read_text()
    )


def test_the_commands_take_their_options() -> None:
    args = parse_arguments(["train", "--runs", "r", "--data", "d.npz", "--only", "hybrid-*", "vlb-cosine-0"])
    assert args.only == ["hybrid-*", "vlb-cosine-0"]
    args = parse_arguments(["evaluate", "--runs", "r", "--test", "t.npz", "--judge", "j", "--steps", "25", "0"])
    assert (args.command, args.steps, args.nll_images) == ("evaluate", [25, FULL], Options.nll_images)
