"""Plots of runs and evaluations as PNG files, with matplotlib: figures 2, 7 and 10 of IDDPM, and loss by quartile."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainer.evaluation.collected import Collected, Line, Results, distinct_names, of_kind
from trainer.log import QUARTILES

Theme = Literal["light", "dark"]

COLOURS: Mapping[Theme, tuple[str, ...]] = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8a7f00", "#777777"),
    "dark": ("#56B4E9", "#E69F00", "#2fc79a", "#e39ac3", "#4f8fe0", "#ff8a3d", "#F0E442", "#bbbbbb"),
}
"""Okabe and Ito's colours, which colour-blind readers can tell apart; lighter on a dark background."""
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
BACKGROUND: Mapping[Theme, str] = {"light": "#ffffff", "dark": "#16181d"}
INK: Mapping[Theme, str] = {"light": "#1c1e21", "dark": "#d8dade"}
DPI = 130
SMOOTHING = 10
"""A curve is the mean over the last 1 / SMOOTHING of the lines so far, so that a steep start is not smeared."""
QUARTER_NAMES = ("least noise: first quarter of t", "second quarter", "third quarter", "most noise: last quarter")
QuartileTerm = Literal["loss", "mse", "vb_bpd"]
BY_QUARTILE: Mapping[QuartileTerm, tuple[str, str, str]] = {
    "loss": ("objective_by_quartile", "The loss that is minimised,", "loss, unweighted"),
    "mse": ("loss_by_quartile", "Prediction error", "mean squared error of eps"),
    "vb_bpd": ("bound_by_quartile", "Terms of the variational bound", r"$L_{vlb}$ / T (bits/dim)"),
}
"""Name of the plot, its title, and the label of its axis, by term of the log."""
LOSSES = {"simple": r"$L_{simple}$", "vlb": r"$L_{vlb}$", "hybrid": r"$L_{hybrid}$"}
TIMESTEP_SAMPLERS = {"uniform": "uniform t", "loss_second_moment": "importance-sampled t", "stratified": "stratified t"}


def plots_of(found: Sequence[Collected], theme: Theme = "light") -> dict[str, bytes]:
    """Return PNG files by name, without suffix, of all plots that the files allow.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = {name: each.lines for name, each in zip(distinct_names(found), found, strict=True) if each.lines}
    drawn: dict[str, bytes] = {}
    for term, (name, *_) in BY_QUARTILE.items():
        if _has(runs, f"{term}_q") and not (term == "loss" and _is_error_only(runs)):
            drawn[name] = loss_by_quartile(runs, theme, term)
    if runs:
        drawn["training"] = training(runs, theme)
    if any("noise_trace" in line for lines in runs.values() for line in lines):
        drawn["noise_scale_training"] = noise_scale_training(runs, theme)
    if nll := of_kind(found, "nll"):
        drawn["vlb_terms"] = vlb_terms(nll, theme)
    if noise := of_kind(found, "noise-scale"):
        drawn["noise_scale"] = noise_scale(noise, theme)
    for results in of_kind(found, "scaling"):
        name = "quality_over_compute" if "quality_over_compute" not in drawn else f"quality_{results.path.parent.name}"
        drawn[name] = quality_over_compute(results.content, theme)
    return drawn


def loss_by_quartile(runs: Mapping[str, Sequence[Line]], theme: Theme = "light", term: QuartileTerm = "mse") -> bytes:
    """Draw a loss term over training, a panel per quarter of the timesteps and a curve per run that has the term."""
    _, title, label = BY_QUARTILE[term]
    figure, axes = _panels(2, 2, theme, width=10, height=7)
    for q, axis in enumerate(axes.flat):
        for index, (name, lines) in enumerate(runs.items()):
            _curve(axis, lines, f"{term}_q{q}", name, index, theme)
        _images_axis(axis)
        _logarithmic_y(axis)
        axis.set_title(QUARTER_NAMES[q])
        axis.set_ylabel(label)
    assert len(axes.flat) == QUARTILES  # noqa: S101
    figure.suptitle(f"{title} by quarter of the timesteps", fontsize=14)
    _legend(axes.flat[0], len(runs))
    return _png(figure, theme)


def _has(runs: Mapping[str, Sequence[Line]], prefix: str) -> bool:
    return any(key.startswith(prefix) for lines in runs.values() for line in lines for key in line)


def _is_error_only(runs: Mapping[str, Sequence[Line]]) -> bool:
    """Return whether every run minimises the mean squared error, which has a plot of its own."""
    return all(
        line[key] == line.get(key.replace("loss", "mse"))
        for lines in runs.values()
        for line in lines
        for key in line
        if key.startswith("loss_q")
    )


def training(runs: Mapping[str, Sequence[Line]], theme: Theme = "light") -> bytes:
    """Draw loss terms, gradient norm, learning rate and speed over training."""
    panels = {
        "loss": ("The loss that is minimised", "loss", "log"),
        "mse": ("Mean squared error of eps", "mean squared error", "log"),
        "vb_bpd": ("Term of the variational bound", r"$L_{vlb}$ / T (bits/dim)", "log"),
        "grad_norm": ("Norm of the gradient", "norm", "log"),
        "lr": ("Learning rate", "learning rate", "linear"),
    }
    used = {
        name: panel for name, panel in panels.items() if any(name in line for lines in runs.values() for line in lines)
    }
    columns = 2 if len(used) > 1 else 1
    rows = -(-len(used) // columns)
    figure, axes = _panels(rows, columns, theme, width=5 * columns, height=3.5 * rows)
    for axis, (key, (title, label, scale)) in zip(axes.flat, used.items(), strict=False):
        for index, (name, lines) in enumerate(runs.items()):
            _curve(axis, lines, key, name, index, theme)
        _images_axis(axis)
        if scale == "log":
            _logarithmic_y(axis)
        axis.set_title(title)
        axis.set_ylabel(label)
    for axis in list(axes.flat)[len(used) :]:
        axis.set_visible(False)
    figure.suptitle("Training", fontsize=14)
    _legend(axes.flat[0], len(runs))
    return _png(figure, theme)


def vlb_terms(results: Sequence[Results], theme: Theme = "light") -> bytes:
    """Draw the terms of the variational bound per timestep, as in figure 2 of the paper."""
    figure, axes = _panels(1, 1, theme, width=8, height=5)
    (axis,) = axes.flat
    models = [model for each in results for model in each.content["models"]]
    for index, model in enumerate(models):
        terms = np.array([math.nan if term is None else term for term in model["vb_bpd"]["mean"]])
        label = f"{model['name']}: {model['total_bpd']['mean']:.3f} bits/dim in sum"
        axis.plot(np.array(model["timesteps"]) + 1, terms, _style(index), color=_colour(index, theme), label=label)
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("diffusion step t, from 1 (least noise)")
    axis.set_ylabel("term of the bound (bits/dim)")
    axis.set_title("Terms of the variational bound")
    axis.legend(fontsize=10)
    return _png(figure, theme)


def noise_scale(results: Sequence[Results], theme: Theme = "light") -> bytes:
    """Draw gradient noise scales by objective over training, as in figure 7 of the paper, with standard errors."""
    figure, axes = _panels(1, 1, theme, width=8, height=5)
    (axis,) = axes.flat
    series: dict[str, list[tuple[float, float, float]]] = {}
    for each in results:
        seen = each.content.get("images_seen") or 0
        for case in each.content["cases"]:
            estimate = case["noise_scale"]
            if estimate["value"] is None or estimate["value"] <= 0:
                continue
            sampler = TIMESTEP_SAMPLERS.get(case["timestep_sampler"], case["timestep_sampler"])
            label = f"{LOSSES.get(case['loss'], case['loss'])}, {sampler}"
            series.setdefault(label, []).append((seen, estimate["value"], estimate["std_error"] or 0.0))
    for index, (label, points) in enumerate(series.items()):
        x, y, error = (np.array(values) for values in zip(*sorted(points), strict=True))
        low = np.minimum(error, 0.9 * y)  # the logarithmic axis has no zero
        axis.errorbar(
            x, y, (low, error), linestyle=_style(index), marker=MARKERS[index % len(MARKERS)], capsize=4,
            color=_colour(index, theme), label=label,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("training images seen")
    axis.xaxis.set_major_formatter(_counts())
    axis.set_ylabel("gradient noise scale (images)")
    axis.set_title("Gradient noise scale; bars: one standard error")
    if series:
        axis.legend(fontsize=10)
    return _png(figure, theme)


def noise_scale_training(runs: Mapping[str, Sequence[Line]], theme: Theme = "light") -> bytes:
    """Draw the gradient noise scale during training, as in figure 7 of the paper: the ratio of two running means."""
    figure, axes = _panels(1, 1, theme, width=8, height=5)
    (axis,) = axes.flat
    for index, (name, lines) in enumerate(runs.items()):
        points = [
            (line["images"], line["noise_trace"], line["gradient_squared"]) for line in lines if "noise_trace" in line
        ]
        if not points:
            continue
        x, trace, squared = (np.array(values, np.float64) for values in zip(*points, strict=True))
        trace, squared = _running_mean(trace), _running_mean(squared)
        ratio = np.divide(trace, squared, out=np.full_like(trace, math.nan), where=(squared > 0) & (trace > 0))
        axis.plot(x, ratio, _style(index), color=_colour(index, theme), linewidth=1.8, label=name)
    _images_axis(axis)
    axis.set_yscale("log")
    axis.set_ylabel("gradient noise scale (images)")
    axis.set_title("Gradient noise scale during training")
    _legend(axis, len(runs))
    return _png(figure, theme)


def quality_over_compute(content: Mapping[str, Any], theme: Theme = "light") -> bytes:
    """Draw the measures of a scaling study over training compute, as in figure 10 of the paper.

    Args:
        content: the results of `iddpm study scaling`.
        theme: of the background.
    """
    measures = content["measures"]
    figure, axes = _panels(1, len(measures), theme, width=6.5 * len(measures), height=5)
    for axis, (measure, described) in zip(axes.flat, measures.items(), strict=True):
        spans = []
        for index, network in enumerate(content["networks"]):
            points = [(p["flops"], p[measure]) for p in network["points"] if p.get(measure) is not None]
            if not points:
                continue
            flops, values = zip(*sorted(points), strict=True)
            spans += [min(flops), max(flops)]
            label = f"{network['channels']} channels ({network['parameters'] / 1e6:.2g} M parameters)"
            axis.plot(
                flops, values, "-", marker=MARKERS[index % len(MARKERS)], color=_colour(index, theme), label=label
            )
        fit = described.get("fit")
        if fit and spans:
            x = np.geomspace(min(spans), max(spans), 100)
            y = fit["limit"] + (fit["scale"] * x) ** -fit["exponent"]
            text = f"{fit['limit']:.3g} + ({fit['scale']:.2g} C)$^{{-{fit['exponent']:.2g}}}$"
            axis.plot(x, y, "--", color=INK[theme], linewidth=1.3, label=text)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(_plain_numbers())
        axis.xaxis.set_minor_formatter(_plain_numbers(few=True))  # the default's overlap over one or two decades
        _logarithmic_y(axis)
        axis.set_xlabel("training compute C (FLOPs)")
        axis.set_ylabel(described["label"])
        axis.set_title(f"{described['label']} over compute")
        axis.legend(fontsize=9)
    return _png(figure, theme)


def _panels(rows: int, columns: int, theme: Theme, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=BACKGROUND[theme])
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_facecolor(BACKGROUND[theme])
        axis.grid(alpha=0.2, color=INK[theme])
        axis.grid(which="minor", alpha=0.07, color=INK[theme])
        axis.tick_params(which="both", labelsize=10)
        axis.xaxis.label.set_size(11)
        axis.yaxis.label.set_size(11)
        axis.title.set_size(12)
        for spine in axis.spines.values():
            spine.set_color(INK[theme])
    return figure, axes


def _png(figure: Any, theme: Theme) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    ink = INK[theme]
    for text in figure.findobj(Text):
        text.set_color(ink)
    for axis in figure.axes:
        axis.tick_params(which="both", colors=ink)
        if (legend := axis.get_legend()) is not None:
            legend.get_frame().set(facecolor=BACKGROUND[theme], edgecolor=ink, alpha=0.85)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _curve(axis: Any, lines: Sequence[Line], key: str, name: str, index: int, theme: Theme) -> None:
    """Draw the values of a log, pale, and their running mean."""
    points = [(line["images"], line[key]) for line in lines if key in line]
    if not points:
        return
    x, y = (np.array(values, np.float64) for values in zip(*points, strict=True))
    if key != "lr":
        axis.plot(x, y, color=_colour(index, theme), alpha=0.25, linewidth=0.8)
        y = _running_mean(y)
    axis.plot(x, y, _style(index), color=_colour(index, theme), linewidth=1.8, label=name)


def _running_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the mean over the last 1 / SMOOTHING of the values so far."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    last = np.arange(len(values))
    first = last - last // SMOOTHING
    means: npt.NDArray[np.float64] = (sums[1:] - sums[first]) / (last - first + 1)
    return means


def _images_axis(axis: Any) -> None:
    axis.set_xlabel("training images seen")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_counts())


def _legend(axis: Any, count: int) -> None:
    if count > 1:
        axis.legend(fontsize=10)


def _colour(index: int, theme: Theme) -> str:
    return COLOURS[theme][index % len(COLOURS[theme])]


def _style(index: int) -> str:
    return STYLES[index % len(STYLES)]


def _counts() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _logarithmic_y(axis: Any) -> None:
    """Make the y axis logarithmic, after its curves are drawn, with enough numbers also over less than a decade."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_plain_numbers())
    low, high = axis.get_ylim()
    if high < 12 * low:
        axis.yaxis.set_major_locator(MaxNLocator(6))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_minor_formatter(_plain_numbers(few=True))


def _plain_numbers(*, few: bool = False) -> Any:
    """Format numbers of a logarithmic axis without powers; few: only those that begin with 2 or 5."""
    from matplotlib.ticker import FuncFormatter

    def form(value: float, _position: object) -> str:
        return "" if few and f"{value:e}"[0] not in "25" else f"{value:g}"

    return FuncFormatter(form)
