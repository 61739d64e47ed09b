"""Draw a load as a PNG file: latency over time, and its distribution. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from cli.load.report import Report

FAILED = "failed"


def latency_plot(report: Report) -> bytes:
    """Return the plot of a report as a PNG file."""
    mpl.use("Agg")
    figure, (over_time, distribution) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, kind in enumerate(report.kinds):
        answered = [r for r in report.requests if r.kind == kind.name and r.outcome == "answered"]
        if not answered:
            continue
        colour, latencies = f"C{number % 10}", np.sort([record.latency_s for record in answered])
        over_time.plot(
            [record.due_s for record in answered],
            [record.latency_s for record in answered],
            ".",
            color=colour,
            markersize=4,
            label=kind.name,
        )
        share = np.arange(1, len(latencies) + 1) / len(latencies)
        distribution.step(latencies, 100 * share, where="post", color=colour, label=f"{kind.name} ({len(answered)})")
    failed = [record for record in report.requests if record.outcome == "failed"]
    if failed:
        over_time.plot([r.due_s for r in failed], [r.latency_s for r in failed], "x", color="black", label=FAILED)
    for part in (50, 95, 99):
        distribution.axhline(part, color="grey", linewidth=0.6, linestyle=":")
    over_time.set(title="latency over time", xlabel="planned time of the request, s", ylabel="latency, s")
    over_time.set_ylim(bottom=0)
    distribution.set(title="distribution of latency", xlabel="latency, s", ylabel="answered requests, %")
    distribution.set_yticks([0, 25, 50, 75, 95, 100])
    for axis in (over_time, distribution):
        axis.grid(alpha=0.3)
        if axis.has_data() and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    how = f"{report.concurrency} in flight" if report.rate is None else f"{report.rate:g} requests/s"
    figure.suptitle(
        f"{report.url}, {how} for {report.duration_s:g} s, {report.started:%Y-%m-%d %H:%M} UTC", fontsize=10
    )
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
    return file.getvalue()
