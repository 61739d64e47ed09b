"""Draw curves as a PNG file with matplotlib (extra `plots`), imported on use."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formats.atomic_file import replace_file
from formats.extras import install_command


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line with its spread."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw_curves(
    plots: Mapping[str, Sequence[Curve]],
    x_label: str,
    y_label: str,
    path: Path,
    *,
    powers_of_two: bool = True,
    log_y: bool = False,
) -> bool:
    """Draw one plot per title, side by side.

    Args:
        plots: curves by title.
        x_label: of all plots.
        y_label: of all plots.
        path: output file.
        powers_of_two: whether the x axis is logarithmic to base 2.
        log_y: whether the y axis is logarithmic; otherwise it begins at 0.

    Returns:
        Whether the file was written; if matplotlib is missing or the disk is full, a message is printed on stderr.
    """
    try:
        import matplotlib as mpl
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        print(f"{path.name} was not drawn: {error.name} is missing; {install_command('plots')}", file=sys.stderr)
        return False
    if not plots:
        return False
    mpl.use("Agg")
    names = list(dict.fromkeys(curve.name for lines in plots.values() for curve in lines))
    figure, axes = plt.subplots(1, len(plots), figsize=(6.5 * len(plots), 5), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], plots.items(), strict=True):
        for curve in lines:
            colour = f"C{names.index(curve.name) % 10}"
            style = "-" if names.index(curve.name) < 10 else "--"
            axis.plot(curve.x, curve.y, style, marker="o", markersize=3, color=colour, label=curve.name)
            axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        if powers_of_two:
            axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({x for curve in lines for x in curve.x}))
        axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        if log_y:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y_label)
    axes[0][0].legend(fontsize=8)
    kind = path.suffix.removeprefix(".")
    try:
        replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120, format=kind))
    except OSError as error:
        print(f"{path} was not drawn: {error.strerror}", file=sys.stderr)
        return False
    finally:
        plt.close(figure)
    return True
