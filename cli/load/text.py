"""The results of a load as text for a terminal: tables, with times in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cli.load.report import Group, Percentiles, Prediction, Report

LATE_S, LATE_SHARE = 0.05, 0.1
"""The generator's lateness (p99) is worth a warning above these seconds and above this part of the median latency."""
NONE = "-"


def report_text(report: Report) -> str:
    """Return the results as text, with times in seconds."""
    parts = [_head(report), "", _latency_table(report)]
    predictions = _prediction_table(report.all)
    if predictions:
        parts += ["", predictions]
    if report.failures:
        lines = [[str(f.status or NONE), str(f.count), f.reason] for f in report.failures]
        parts += ["", _table(["status", "failed", "reason"], lines, left={0, 2})]
    if _is_late(report):
        parts += [
            "",
            f"Requests were sent late (p99 {_p99(report.late_s):.3f} s): this process was too slow for the load. "
            "Latency counts from the planned time and includes the delay.",
        ]
    return "\n".join(parts)


def _is_late(report: Report) -> bool:
    median = 0.0 if report.all.latency_s is None else report.all.latency_s.p50
    return _p99(report.late_s) > max(LATE_S, LATE_SHARE * median)


def _p99(values: Percentiles | None) -> float:
    return 0.0 if values is None else values.p99


def _head(report: Report) -> str:
    total = report.all
    how = f"{report.concurrency} in flight" if report.rate is None else f"{report.rate:g} requests/s, open loop"
    served = "; ".join(f"{model.name}: {model.backend}" for model in report.models)
    early = f", ended early after {report.elapsed_s:.1f} s" if report.ended_early else ""
    unfinished = f", {total.unfinished} unfinished" if total.unfinished else ""
    return "\n".join(
        [
            f"{report.url}  {served}",
            f"{how} for {report.duration_s:g} s{early}: {total.requests} requests, {total.answered} answered, "
            f"{total.failed} failed{unfinished}; {total.images_per_s:.2f} images/s",
        ]
    )


def _latency_table(report: Report) -> str:
    groups: list[tuple[str, Group]] = [(kind.name, kind) for kind in report.kinds]
    if len(groups) > 1:
        groups.append(("all", report.all))
    header = ["latency, s", "requests", "answered", "images/s", "alone", "mean", "p50", "p95", "p99", "max"]
    return _table(
        header,
        [
            [
                name,
                str(group.requests),
                str(group.answered),
                f"{group.images_per_s:.2f}",
                NONE if group.alone_s is None else f"{group.alone_s:.3f}",
                *_numbers(group.latency_s),
            ]
            for name, group in groups
        ],
    )


def _prediction_table(group: Group) -> str | None:
    lines: list[list[str]] = []
    for name, prediction in (("wait", group.wait), ("finish", group.finish)):
        if prediction is not None:
            lines += _prediction_lines(name, prediction)
    return _table(["the service's times, s", "mean", "p50", "p95", "p99", "max"], lines) if lines else None


def _prediction_lines(name: str, prediction: Prediction) -> list[list[str]]:
    return [
        [name, *_numbers(prediction.real_s)],
        [f"{name}, predicted", *_numbers(prediction.predicted_s)],
        [f"{name}, |predicted - real|", *_numbers(prediction.error_s)],
    ]


def _numbers(values: Percentiles | None) -> list[str]:
    if values is None:
        return [NONE] * len(Percentiles.model_fields)
    return [f"{value:.3f}" for value in (values.mean, values.p50, values.p95, values.p99, values.max)]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    align = ["<" if column in set(left) else ">" for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)).rstrip()
        for line in (header, *lines)
    )
