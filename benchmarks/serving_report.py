"""Write the section for RESULTS.md with the measurements of benchmarks/serving.py, and its plots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.open_loop import OK, Answer
from benchmarks.plots import Curve, draw_curves
from benchmarks.reporting import markdown_table
from benchmarks.serving_record import Run
from benchmarks.traffic import SLO
from cli.load.report import percentile

HEADER = (
    *(
        "server",
        "requests",
        "offered",
        "refused",
        "mean s (runs)",
        "p50",
        "p95",
        "p99",
        "slowdown by steps",
        f"within {SLO:g}x",
    ),
    *("goodput", "busy", "rows/call", "c(W) in the run", "goodput by it", "offered by it"),
)


@dataclass(frozen=True)
class Window:
    """Measurements of a server between the warm-up of a run and its last request."""

    goodput: float
    """Row-steps per second over capacity, of requests that were answered by the end of the run."""
    busy: float
    """Fraction of the time in which the network ran."""
    rows_per_call: float
    full_call_s: float | None
    """Mean seconds of a call at full width, if there were any."""
    goodput_then: float | None
    """Goodput over the capacity computed from those calls: the device's speed in this window."""
    offered_then: float | None
    """The load of the requests that arrived in this window, relative to the same capacity."""

    @classmethod
    def of(cls, run: Run) -> Window:
        """Summarise a run."""
        _, begin, end, _ = run.marks
        seconds, did = end.at - begin.at, end.reading.since(begin.reading)
        full = did.calls[run.width - 1]
        full_call_s = did.seconds[run.width - 1] / full if full else None
        unit = None if full_call_s is None else full_call_s / run.width / seconds  # of the window, by row-step
        offered = sum(answer.row_steps for answer in run.answers if begin.at <= answer.at < end.at)
        return cls(
            goodput=did.row_steps / seconds / run.capacity,
            busy=did.busy_s / seconds,
            rows_per_call=did.row_steps / max(1.0, sum(did.calls)),
            full_call_s=full_call_s,
            goodput_then=None if unit is None else did.row_steps * unit,
            offered_then=None if unit is None else offered * unit,
        )


@dataclass(frozen=True)
class Recovery:
    """Recovery after the last request."""

    backlog_s: float
    """Remaining accepted work over capacity: the minimum duration."""
    took_s: float
    """Seconds until all requests were answered."""

    @classmethod
    def of(cls, run: Run) -> Recovery:
        """Summarise a run."""
        start, _, end, _ = run.marks
        left = sum(a.row_steps for a in answered(run)) - end.reading.since(start.reading).row_steps
        return cls(left / run.capacity, max(a.ended for a in answered(run)) - end.at)


def answered(run: Run) -> list[Answer]:
    """Return the requests that got images."""
    return [answer for answer in run.answers if answer.status == OK]


def slowdown(run: Run, answer: Answer) -> float:
    """Return latency over what the request would take alone: calls of its rows, without any overhead."""
    alone = min(seconds for rows, seconds in run.costs.items() if rows >= answer.rows)
    return answer.latency / (answer.steps * alone)


def write_report(out: Path, runs: Sequence[Run]) -> None:
    """Write serving.md and, where matplotlib is installed, serving.png."""
    loads = loads_of(runs)
    servers = list(dict.fromkeys(run.server for run in runs))
    parts = [
        "## Serving",
        "",
        "Open loop: requests of 50, 100 and 250 steps (.5, .3, .2) and 1 to 4 images come as a Poisson process, the "
        "same for every server; latency counts from when a request was due. Load is offered row-steps per second over "
        "W / c(W), W rows per call at most, c(n) the median time of a network call with n rows, timed before each "
        "round; offered is what came of it in runs of this length. Servers take turns. Mean: median over runs, in "
        "brackets the smallest and largest; percentiles are of all runs together. Slowdown: latency over the network's "
        f"time for the request alone. Within {SLO:g}x: part of all requests with at most that slowdown. Goodput: "
        "row-steps per second over W / c(W), and busy: part of the time that the network ran, both from a quarter of "
        "the run to its last request, and of requests that were answered, all of them in the end. rows/call: mean "
        "rows, padding left out. By c(W) in the run: goodput and offered load where capacity is what calls at full "
        "width took in that same window.",
        "",
        *(f"- {name}: {value}" for name, value in facts(runs).items()),
        "",
    ]
    for load in loads:
        here = [[run for run in runs if (run.load, run.server) == (load, server)] for server in servers]
        here = [of_server for of_server in here if of_server]
        parts += [f"### Load {load:g}", "", markdown_table(HEADER, [line(of_server) for of_server in here]), ""]
        if load > 1:
            parts += [markdown_table(RECOVERY_HEADER, [recovery_line(of_server) for of_server in here]), ""]
    (out / "serving.md").write_text("\n".join(parts), encoding="utf-8")
    plots = {
        "mean latency, s": curves(runs, servers, mean_latency),
        "p99 latency, s": curves(runs, servers, lambda run: percentile((a.latency for a in answered(run)), 0.99)),
    }
    if len(loads) > 1:
        draw_curves(plots, "load", "seconds", out / "serving.png", powers_of_two=False)


def facts(runs: Sequence[Run]) -> dict[str, str]:
    """Return the common facts of all runs, c(n) and the delays of the generator."""
    commits = dict.fromkeys(run.facts["Commit"] for run in runs)
    costs = [run.costs for run in runs]
    sizes = ", ".join(
        f"c({rows}) = {1e3 * statistics.median(c[rows] for c in costs):.1f} "
        f"({1e3 * min(c[rows] for c in costs):.1f}-{1e3 * max(c[rows] for c in costs):.1f})"
        for rows in costs[0]
    )
    device = runs[-1].facts.get("Device", "openvino")
    late = max(a.sent - a.at for run in runs for a in run.answers)
    return {
        **runs[-1].facts,
        "Commit": ", ".join(commits),
        "Network": f"fashion32 in {device}; ms, medians and range over rounds: {sizes}; W = {runs[-1].width}",
        "Runs": f"{len(runs)}, requests come for {runs[-1].seconds:g} s in each; seeds "
        + ", ".join(str(seed) for seed in sorted({run.seed for run in runs})),
        "Generator": f"sent requests at most {1e3 * late:.0f} ms after they were due",
    }


def line(runs: Sequence[Run]) -> list[str]:
    """Return the table row of a server at a load."""
    good = [answer for run in runs for answer in answered(run)]
    latencies = [answer.latency for answer in good]
    total = sum(len(run.answers) for run in runs)
    slow: dict[int, list[float]] = {a.steps: [] for a in sorted(good, key=lambda a: a.steps)}
    well = 0
    for run in runs:
        for answer in answered(run):
            slow[answer.steps].append(slowdown(run, answer))
            well += slow[answer.steps][-1] <= SLO
    windows = [Window.of(run) for run in runs]
    full = [w.full_call_s for w in windows if w.full_call_s is not None]
    return [
        runs[0].server,
        str(total),
        f"{statistics.median(sum(a.row_steps for a in r.answers) / r.seconds / r.capacity for r in runs):.2f}",
        str(total - len(good)),
        median_and_range([mean_latency(run) for run in runs], "{:.2f}"),
        *(f"{percentile(latencies, part):.2f}" for part in (0.5, 0.95, 0.99)),
        " / ".join(f"{statistics.fmean(values):.1f}" for values in slow.values()),
        f"{well / total:.2f}",
        median_and_range([w.goodput for w in windows], "{:.3f}"),
        median_and_range([w.busy for w in windows], "{:.3f}"),
        f"{statistics.median(w.rows_per_call for w in windows):.1f}",
        f"{1e3 * statistics.median(full):.1f} ms" if full else "-",
        *(
            median_and_range(values, "{:.3f}") if values else "-"
            for values in (
                [w.goodput_then for w in windows if w.goodput_then is not None],
                [w.offered_then for w in windows if w.offered_then is not None],
            )
        ),
    ]


RECOVERY_HEADER = ("server", "work left at the last request, s of capacity", "until all was answered, s", "ratio")


def recovery_line(runs: Sequence[Run]) -> list[str]:
    """Return the table row of a server's recovery from overload."""
    seen = [Recovery.of(run) for run in runs]
    return [
        runs[0].server,
        median_and_range([r.backlog_s for r in seen], "{:.1f}"),
        median_and_range([r.took_s for r in seen], "{:.1f}"),
        median_and_range([r.took_s / r.backlog_s for r in seen], "{:.2f}"),
    ]


def mean_latency(run: Run) -> float:
    """Return the mean over the requests that got images."""
    return statistics.fmean(answer.latency for answer in answered(run))


def median_and_range(values: Sequence[float], form: str) -> str:
    """Format a median and its range."""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))}-{form.format(max(values))})"


def curves(runs: Sequence[Run], servers: Sequence[str], of: Callable[[Run], float]) -> list[Curve]:
    """Return a curve per server: median and range over its runs, by load."""
    made = []
    for server in servers:
        by_load = {
            load: [of(run) for run in runs if (run.server, run.load) == (server, load)] for load in loads_of(runs)
        }
        seen = {load: values for load, values in by_load.items() if values}
        made.append(
            Curve(
                name=server,
                x=list(seen),
                y=[statistics.median(values) for values in seen.values()],
                low=[min(values) for values in seen.values()],
                high=[max(values) for values in seen.values()],
            )
        )
    return made


def loads_of(runs: Sequence[Run]) -> list[float]:
    """Return the loads, ascending."""
    return sorted({run.load for run in runs})
