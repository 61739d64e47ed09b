"""`iddpm plot`: PNG files of runs and evaluations."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from trainer.evaluation.collected import collect
from trainer.evaluation.plots import BACKGROUND, plots_of

SCALING: dict[str, Any] = {
    "kind": "scaling",
    "measures": {
        "frechet_distance": {"label": "Fréchet distance", "fit": {"limit": 1.0, "scale": 1e-12, "exponent": 0.3}},
        "bits_per_dim": {"label": "NLL (bits/dim)", "fit": None},
    },
    "networks": [
        {
            "channels": 32,
            "parameters": 1e5,
            "points": [
                {"images": k, "flops": 1e10 * k, "frechet_distance": 9 / k, "bits_per_dim": 4 - k / 9}
                for k in (1, 2, 3)
            ],
        }
    ],
}


def write_run(folder: Path, log: str = "metrics.jsonl", scale: float = 1.0, terms: tuple[str, ...] = ("mse",)) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"images": 100 * k, "lr": 1e-3, "mse": scale / k, "vb_bpd": 0.1 / k, "grad_norm": 1.0}
        | {"noise_trace": 90.0 + k, "gradient_squared": 1.0 - 0.2 * (k % 9)}
        | {f"{term}_q{q}": scale / k / (q + n) for n, term in enumerate(terms, start=1) for q in range(4)}
        for k in range(1, 30)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / log).write_text(text + '{"images": 3000, "mse"')  # a line that is being written
    return folder


def write_results(folder: Path) -> Path:
    def estimate(value: float | None) -> dict[str, float | None]:
        return {"value": value, "std_error": None if value is None else value / 3}

    models = [
        {"name": "m", "timesteps": [0, 1, 2], "total_bpd": {"mean": 3.5}, "vb_bpd": {"mean": [1.0, 0.5, None]}},
    ]
    cases = [
        {"loss": "vlb", "timestep_sampler": "uniform", "noise_scale": estimate(300.0)},
        {"loss": "vlb", "timestep_sampler": "loss_second_moment", "noise_scale": estimate(None)},
    ]
    contents = {
        "nll": {"kind": "nll", "models": models},
        "noise": {"kind": "noise-scale", "images_seen": 1000, "cases": cases},
        "scaling": SCALING,
        "other": {"kind": "of another program"},
    }
    for name, content in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(content))
    return folder


def test_runs_and_evaluations_become_png_files(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b" / "a", "log.jsonl", 2.0)]
    write_results(runs[0])
    result = CliRunner().invoke(app, ["plot", *map(str, runs), "--out", str(tmp_path / "plots")])
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {
        *("loss_by_quartile.png", "training.png", "vlb_terms.png", "noise_scale.png", "noise_scale_training.png"),
        "quality_over_compute.png",
    }
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) >= 400


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (("mse",), {"loss_by_quartile"}),
        (("mse", "vb_bpd", "loss"), {"loss_by_quartile", "bound_by_quartile", "objective_by_quartile"}),
        (("loss", "acc@1"), {"objective_by_quartile"}),
    ],
)
def test_every_term_of_the_loss_is_drawn_by_quartile(
    terms: tuple[str, ...], expected: set[str], tmp_path: Path
) -> None:
    drawn = plots_of([collect(write_run(tmp_path / "run", terms=terms))])
    assert {name for name in drawn if name.endswith("quartile")} == expected
    assert len(set(drawn.values())) == len(drawn)


def test_a_loss_that_is_the_prediction_error_is_not_drawn_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    copied = [{**line, **{f"loss_q{q}": line[f"mse_q{q}"] for q in range(4)}} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in copied))
    assert {name for name in plots_of([collect(folder)]) if name.endswith("quartile")} == {"loss_by_quartile"}


def test_plots_have_the_background_of_their_theme(tmp_path: Path) -> None:
    found = [collect(write_results(tmp_path / "evaluations"))]
    for theme, background in BACKGROUND.items():
        for content in plots_of(found, theme).values():
            with Image.open(io.BytesIO(content)) as picture:
                corner = picture.convert("RGB").getpixel((0, 0))
            assert corner == tuple(bytes.fromhex(background[1:]))


def test_a_folder_without_a_run_or_an_evaluation_is_refused(tmp_path: Path) -> None:
    for name, message in (("absent", "does not exist"), ("", "neither a run")):
        result = CliRunner().invoke(app, ["plot", str(tmp_path / name), "--out", str(tmp_path / "plots")])
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_results_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    result = CliRunner().invoke(app, ["plot", str(tmp_path), "--out", str(tmp_path / "plots")])
    assert result.exit_code == 1
    assert "results.json" in result.output
