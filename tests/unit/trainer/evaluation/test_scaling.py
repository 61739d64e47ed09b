"""The scaling study: compute is counted, the law is found, an interrupted study continues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.config import ModelConfig
from tests.unit.trainer.test_trainer import npz, tiny
from trainer.data import open_dataset
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.scaling import (
    fit_power_law,
    frontier,
    parameter_count,
    points_of,
    study,
    training_flops,
    width_config,
)
from trainer.evaluation.scaling_report import scaling_page

__all__ = ["npz"]


def test_a_power_law_is_found_with_and_without_its_limit() -> None:
    compute = np.geomspace(1e12, 1e16, 8)
    points = list(zip(compute, 3.4 + (3e-15 * compute) ** -0.17, strict=True))
    given = fit_power_law(points, 3.4)
    assert given is not None
    assert tuple(given) == pytest.approx((3.4, 3e-15, 0.17), rel=1e-6)
    fitted = fit_power_law(points)
    assert fitted is not None
    assert fitted.limit == pytest.approx(3.4, rel=0.05)
    assert fitted.exponent == pytest.approx(0.17, rel=0.2)


def test_no_law_is_fitted_to_too_few_points_or_a_loss_that_rises() -> None:
    assert fit_power_law([]) is None
    assert fit_power_law([(1.0, 3.0), (2.0, 2.0)], 0.0) is None
    assert fit_power_law([(1.0, 3.0), (2.0, 2.0), (4.0, 1.5)]) is None
    assert fit_power_law([(1.0, 1.0), (2.0, 2.0), (4.0, 3.0)], 0.0) is None


def test_the_frontier_is_the_best_for_its_compute() -> None:
    assert frontier([(4, 2), (1, 5), (2, 6), (3, 3), (5, 2)]) == [(1, 5), (3, 3), (4, 2)]


def test_compute_is_three_forward_passes_of_products_and_convolutions() -> None:
    model = ModelConfig(
        image_size=8, image_channels=1, model_channels=32, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), num_heads=1,
    )  # fmt: skip
    flops = training_flops(model)
    weights = parameter_count(model)
    assert 3 * 2 * 64 * weights * 0.5 < flops < 3 * 2 * 64 * weights * 1.5  # nearly all weights are used at 64 pixels
    wide = model.replace(model_channels=64)
    assert 3 < training_flops(wide) / flops < 4.2


def test_points_double_in_whole_batches_and_rates_follow_the_width() -> None:
    assert points_of(1000, 3, 64) == [256, 512, 1024]
    config = width_config(tiny(), 64, 400)
    assert config.model.model_channels == 64
    assert config.lr == pytest.approx(1e-3 / 2**0.5)
    assert config.lr_schedule == "constant"


def run_study(npz: Path, out: Path, seen: list[str], fail_at: int = 99, **changes: Any) -> dict[str, Any]:
    dataset = open_dataset(npz, 8, 1)

    def evaluate(model: Path, folder: Path) -> dict[str, float]:
        if len(seen) == fail_at:
            raise OSError("killed")
        provenance = json.loads((model / "config.json").read_text())["provenance"]
        seen.append(f"{folder.parent.name} {provenance['images_seen']} {int(folder.name)}")
        return {"frechet_distance": 10.0 / len(seen)}

    options: dict[str, Any] = {"widths": [32, 64], "images": 16, "count": 2, "limits": {}, "settings": {"num": 4}}
    return study(tiny(preview_per_class=0), dataset, out, evaluate=evaluate, **{**options, **changes})


def test_a_study_trains_each_width_once_and_continues_where_it_was_interrupted(npz: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(OSError, match="killed"):
        run_study(npz, tmp_path / "study", seen, fail_at=1)
    content = run_study(npz, tmp_path / "study", seen)
    assert seen == ["32 8 8", "32 16 16", "64 8 8", "64 16 16"]
    assert content == json.loads((tmp_path / "study" / "results.json").read_text())
    narrow, wide = content["networks"]
    assert [point["images"] for point in narrow["points"]] == [8, 16]
    assert narrow["points"][1]["flops"] == 16 * narrow["flops_per_image"]
    assert wide["parameters"] > 3 * narrow["parameters"]
    assert content["measures"]["frechet_distance"]["label"] == "Fréchet distance"
    run_study(npz, tmp_path / "study", seen)
    assert len(seen) == 4


def test_a_study_of_other_settings_or_impossible_widths_is_refused(npz: Path, tmp_path: Path) -> None:
    run_study(npz, tmp_path / "study", [], widths=[32], images=4, count=1)
    with pytest.raises(EvaluationError, match="with other num"):
        run_study(npz, tmp_path / "study", [], widths=[32], images=4, count=1, settings={"num": 5})
    with pytest.raises(EvaluationError, match="--widths 33"):
        run_study(npz, tmp_path / "odd", [], widths=[33])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(EvaluationError, match="is not empty"):
        run_study(npz, tmp_path / "full", [])
    (tmp_path / "full" / "results.json").write_text('{"results": []}')  # of another command
    with pytest.raises(EvaluationError, match="is not empty"):
        run_study(npz, tmp_path / "full", [])


def test_a_study_whose_runs_could_end_early_is_refused(npz: Path, tmp_path: Path) -> None:
    config = tiny(validation_share=0.2, stop_after_worse=1)
    with pytest.raises(EvaluationError, match=r"stop_after_worse must be null in a scaling study.*got 1"):
        study(
            config, open_dataset(npz, 8, 1), tmp_path / "study", widths=[32], images=16, count=1,
            evaluate=lambda model, folder: {}, limits={}, settings={},
        )  # fmt: skip
    assert not (tmp_path / "study").exists()


def test_widths_may_be_added_to_a_study_which_keeps_the_others(npz: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    run_study(npz, tmp_path / "study", seen, widths=[64])
    content = run_study(npz, tmp_path / "study", seen, widths=[32])
    assert seen == ["64 8 8", "64 16 16", "32 8 8", "32 16 16"]
    assert [network["channels"] for network in content["networks"]] == [32, 64]
    assert [len(network["points"]) for network in content["networks"]] == [2, 2]
    assert content == json.loads((tmp_path / "study" / "results.json").read_text())


def test_a_network_that_was_trained_further_is_not_evaluated_for_an_earlier_point(npz: Path, tmp_path: Path) -> None:
    run_study(npz, tmp_path / "study", [], widths=[32])
    (tmp_path / "study" / "results.json").unlink()
    with pytest.raises(EvaluationError, match=r"has seen more than 8 images.*delete .*32 to study this width again"):
        run_study(npz, tmp_path / "study", [], widths=[32])


def test_a_study_shows_its_results_and_what_is_left_after_each_evaluation(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[int] = []

    def show(results: Mapping[str, Any]) -> None:
        shown.append(sum(len(network["points"]) for network in results["networks"]))

    run_study(npz, tmp_path / "study", [], show=show)
    assert shown == [1, 2, 3, 4]
    lines = [line for line in capsys.readouterr().err.splitlines() if " channels" in line]
    assert lines[0] == "32 channels (1 of 2 widths): training up to 8 of 16 images"
    assert re.fullmatch(r"32 channels, 8 images: Fréchet distance 10; 3 points left, about \d+ min", lines[1])
    assert lines[-1] == "64 channels, 16 images: Fréchet distance 2.5; all points done"


def test_the_page_of_a_study_has_its_points_and_laws() -> None:
    point = {"images": 2000, "flops": 1.5e12, "frechet_distance": 12.3456}
    law = {"limit": 3.0, "scale": 2e-12, "exponent": 0.5, "points": 4}
    page = scaling_page(
        {
            "command": "iddpm study scaling",
            "measures": {
                "frechet_distance": {"label": "Fréchet distance", "fit": law},
                "bits_per_dim": {"label": "NLL (bits/dim)", "fit": None},
            },
            "networks": [{"channels": 8, "parameters": 72762, "points": [point]}, {"channels": 16, "points": []}],
        }
    )
    assert "| 8 | 72,762 | 2,000 | 1.5e+12 | 12.35 | - |" in page
    assert "- Fréchet distance: 3 + (2e-12 C)^-0.5, from 4 points" in page
    assert "- NLL (bits/dim): no power law" in page
    assert page.endswith("```\niddpm study scaling\n```\n")
