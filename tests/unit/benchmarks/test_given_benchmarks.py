"""The benchmarks of samplers and of inpainting, without their networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import repaint, round_trip, sampler_quality
from benchmarks.repaint import paper_masks
from benchmarks.rounds import Timing
from diffusion.chains import Chain, Resample


def row(sampler: str, steps: int, agreed: int) -> dict[str, Any]:
    return {
        "sampler": sampler,
        "steps": steps,
        "agreed": agreed,
        "images": 100,
        "worst_class": 0.5,
        "frechet": 12.345,
        "distance": 3.0,
        "distance_std_error": 0.25,
    }


def test_masks_are_of_five_kinds() -> None:
    half, expand, lines, pixels, brush = paper_masks(8, 12)[:, 0]
    assert half.mean() == 0.5
    assert expand.sum() == 8 * 12 - 4 * 6
    assert lines.mean() == 0.5
    assert pixels.mean() == 0.75  # a quarter of the pixels is given, as for super-resolution
    assert 0 < brush.mean() < 1
    assert set(np.unique(paper_masks(32, 32))) == {0.0, 1.0}


def test_the_section_of_samplers_lists_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [row("ancestral", 10, 80), row("ancestral", 50, 95), row("dpm++", 10, 90)]
    text = sampler_quality.section(found, {"Machine": "a box"}, 1.3)
    assert "100 images per row, cfg_scale 1.3." in text
    assert "| ancestral | 10 | 80.0 % (71.1-86.7) | 50 % | 12.35 | 3.00 +- 0.25 |" in text
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(sampler_quality, "draw_curves", lambda plots, *_: drawn.update(plots) or True)
    assert sampler_quality.draw(found, tmp_path / "plot.png")
    ancestral, dpm = drawn["disagreement (%)"]
    assert (ancestral.name, list(ancestral.x), list(ancestral.y)) == ("ancestral", [10, 50], [20, 5])
    assert dpm.low[0] < dpm.y[0] < dpm.high[0]
    assert {len(curves) for curves in drawn.values()} == {2}


def test_the_section_of_inpainting_counts_images_per_second() -> None:
    chain = Chain(spec="25", resample=Resample(times=3, jump=5))
    text = repaint.section({}, {"openvino:bf16": Timing((2.0, 4.0, 6.0))}, 10, chain, 65)
    assert "10 images with five masks, 25 steps, Resample(times=3, jump=5): 65 network calls per image." in text
    assert "| openvino:bf16 | 4.00 | 3.00-5.00 | 2.500 |" in text


def test_errors_of_a_round_trip_are_in_levels() -> None:
    images = np.full((2, 2, 2, 1), 100, np.uint8)
    decoded = images + np.array([0.25, 3.0], np.float32)[:, None, None, None]
    found = round_trip.errors_of(images, decoded, 50, 2040)
    assert found == round_trip.Errors(steps=50, timestep=2040, mean=1.625, worst=3.0, equal=0.5)
    assert "| 50 | 2040 | 1.62 | 3.00 | 50.0 % |" in round_trip.table([found])
