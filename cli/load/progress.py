"""Show a running load at a terminal: a progress bar with counts and latency so far."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cli.load.recorder import Recorder
from cli.load.report import percentile
from cli.load.run import Watch

TICKS_PER_S = 100
"""Resolution of the bar, which counts integers."""


@contextmanager
def live_progress(duration_s: float) -> Iterator[Watch]:
    """Show a progress bar of the planned duration; yield the function that updates it.

    Elsewhere than at a terminal nothing is shown, because each update would be a line.
    """
    if not sys.stderr.isatty():
        yield lambda recorder, at_s: None
        return
    with typer.progressbar(
        length=max(1, round(TICKS_PER_S * duration_s)),
        bar_template="[%(bar)s] %(label)s",
        width=10,
        file=sys.stderr,
    ) as bar:

        def watch(recorder: Recorder, at_s: float) -> None:
            bar.label = live_line(recorder, at_s, duration_s)
            bar.update(max(0, min(round(TICKS_PER_S * at_s), bar.length or 0) - bar.pos))
            bar.render_progress()  # update() shows nothing while the last answers are awaited

        yield watch


def live_line(recorder: Recorder, at_s: float, duration_s: float) -> str:
    """Return the state of a running load in less than 70 characters; percentiles are those of the latest answers."""
    failed = len(recorder.records) - recorder.answered
    latest = recorder.latest_latencies_s
    latency = f", p50 {percentile(latest, 0.5):.2f}, p99 {percentile(latest, 0.99):.2f} s" if latest else ""
    return (
        f"{at_s:.0f}/{duration_s:.0f} s: {recorder.answered} answered, {recorder.in_flight} in flight, {failed} failed"
        f"{latency}"
    )
