"""The plots of the reproduction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import Curve, draw_curves
from benchmarks.reproduction_cells import CURVES, EXTRA, FULL, WIDTH_NLL_STEPS, WIDTH_STEPS, Cell, read_cell
from benchmarks.reproduction_claims import FIGURE_8, FIGURE_15, STEPS, WIDTHS, Lookup, cell_of
from benchmarks.reproduction_runs import SEEDS, run_name, width_name
from formats.atomic_file import write_file
from formats.json_files import read_object
from trainer.evaluation.plots import quality_over_compute
from trainer.evaluation.scaling import MEASURES, fit_power_law, frontier

TRAINED = {"hybrid": "L_hybrid", "vlbuniform": "L_vlb, uniform", "vlb": "L_vlb, importance sampling"}
LABELS = {"frechet_distance": "Frechet distance", "bits_per_dim": "bits/dim"}


def draw_plots(results: Path, images: Path, value: Lookup) -> list[Path]:
    """Draw the plots for which there are cells; return their files.

    Args:
        results: folder of the cells.
        images: folder of the files.
        value: of a cell.
    """
    images.mkdir(parents=True, exist_ok=True)
    plots = [
        _plot_steps(images / "reproduction_frechet.png", FIGURE_8, ("frechet", "frechet_distance"), [""], value),
        _plot_steps(images / "reproduction_nll.png", FIGURE_15, ("nll", "bits_per_dim"), ["", EXTRA], value),
        _plot_curves(images / "reproduction_curves.png", results),
        _plot_noise(images / "reproduction_noise.png", results),
        _plot_widths(images / "reproduction_widths.png", results),
    ]
    return [path for path in plots if path is not None]


def _plot_steps(
    path: Path, lines: Sequence[tuple[str, str, str]], measure: tuple[str, str], suffixes: Sequence[str], value: Lookup
) -> Path | None:
    """Draw means over seeds by number of steps, with the range over seeds."""
    kind, field = measure
    label = LABELS[field]
    curves = []
    for title, model, variant in lines:
        for suffix in suffixes:
            points = []
            for steps in (*STEPS, *([FULL] if kind == "nll" and not suffix else [])):
                values = [
                    v
                    for seed in SEEDS
                    if (v := value(cell_of(kind, model, steps, variant + suffix)(seed), field)) is not None
                ]
                if values:
                    points.append((float(steps or 1000), float(np.mean(values)), min(values), max(values)))
            if points:
                x, y, low, high = zip(*points, strict=True)
                curves.append(Curve(name=f"{title}{', extra steps' if suffix else ''}", x=x, y=y, low=low, high=high))
    if not curves:
        return None
    return path if draw_curves({f"{label} by number of steps": curves}, "steps", label, path) else None


def _plot_curves(path: Path, results: Path) -> Path | None:
    """Draw figure 6: means over seeds; the band holds both seeds and most lines of their logs."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for name in CURVES:
        found = [read_cell(results, Cell("curves", run_name(name, "cosine", seed))) for seed in SEEDS]
        for points in zip(*(cell["points"] for cell in found if cell is not None), strict=True):
            mean = float(np.mean([point["bits_per_dim"] for point in points]))
            band = min(point["low"] for point in points), max(point["high"] for point in points)
            rows.setdefault(name, []).append((points[0]["images"], mean, *band))
    return _draw_training(path, "bits/dim", rows)


def _plot_noise(path: Path, results: Path) -> Path | None:
    """Draw figure 7: the gradient noise scale of each model with its own loss, means over seeds and their range."""
    scales: dict[tuple[str, int], list[float]] = {}
    runs = {run_name(name, "cosine", seed): name for name in CURVES for seed in SEEDS}
    for file in sorted(results.glob("noise_*.json")):
        content = read_object(file)
        name = runs.get(content["run"])
        if name is not None and content["variant"] == CURVES[name] and content["noise_scale"]["value"] is not None:
            point = name, content["model"]["images_seen"]
            scales.setdefault(point, []).append(content["noise_scale"]["value"])
    rows: dict[str, list[tuple[float, ...]]] = {}
    for (name, images), values in sorted(scales.items()):
        rows.setdefault(name, []).append((images, float(np.mean(values)), min(values), max(values)))
    return _draw_training(path, "gradient noise scale, images", rows)


def _draw_training(path: Path, label: str, rows: dict[str, list[tuple[float, ...]]]) -> Path | None:
    """Draw rows (training images, mean, low, high) by objective."""
    curves = []
    for name in CURVES:
        if name not in rows:
            continue
        x, y, low, high = zip(*rows[name], strict=True)
        images = [round(seen / 1000, 1) for seen in x]
        curves.append(Curve(name=TRAINED[name], x=images, y=y, low=low, high=high))
    title, x_label = f"{label.partition(',')[0]} during training", "thousand training images"
    is_drawn = curves and draw_curves({title: curves}, x_label, label, path, powers_of_two=False, log_y=True)
    return path if is_drawn else None


def _plot_widths(path: Path, results: Path) -> Path | None:
    """Draw quality over compute from the cells of the first seed, with fitted power laws."""
    networks: dict[int, dict[str, Any]] = {}
    names = {width_name(width, SEEDS[0]): width for width in WIDTHS}
    fields = {
        ("frechet", WIDTH_STEPS, "trained"): "frechet_distance",
        ("nll", WIDTH_NLL_STEPS, f"trained{EXTRA}"): "bits_per_dim",
    }
    for file in sorted(results.glob("*_*.json")):
        content = read_object(file)
        field = fields.get((content["kind"], content["steps"], content["variant"]))
        if field is None or content["run"] not in names:
            continue
        model, width = content["model"], names[content["run"]]
        network = networks.setdefault(width, {"channels": width, "parameters": model["parameters"], "points": {}})
        network["points"].setdefault(model["flops"], {"flops": model["flops"]})[field] = content[field]
    if not networks:
        return None
    drawn = [{**networks[width], "points": list(networks[width]["points"].values())} for width in sorted(networks)]
    measures = {}
    for field, label in MEASURES.items():
        points = [(point["flops"], point[field]) for network in drawn for point in network["points"] if field in point]
        if points:
            law = fit_power_law(frontier(points))
            measures[field] = {"label": label, "fit": None if law is None else law._asdict()}
    write_file(path, quality_over_compute({"measures": measures, "networks": drawn}))
    return path
