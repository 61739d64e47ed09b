"""Measure one network call: every backend and precision against PyTorch and diffusers, in turns in one run.

    python -m benchmarks.denoise_step                    # every network, batches 1..64: hours
    python -m benchmarks.denoise_step --quick            # the bundled model, batches 1 and 4: a minute
    python -m benchmarks.denoise_step --device cuda      # CUDA graphs on and off, compiled, batches to 256

For each network and batch size all contenders are loaded, compared with PyTorch in float32, warmed up, and called in
turns, as are convolutions that measure the machine's ceiling at that time. Results are written after every batch size,
to the folder --out: denoise_step.md (the section for RESULTS.md), denoise_step.json (all times) and denoise_step.png.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.ceiling import ceilings, probes
from benchmarks.contenders import (
    CPU_CONTENDERS,
    CUDA_CONTENDERS,
    Absent,
    Call,
    Entry,
    Place,
    Rows,
    open_contender,
    reference_output,
    relative_error,
)
from benchmarks.networks import NETWORKS, BenchNetwork, open_network
from benchmarks.options import add_place_options, exit_status, place_of, say
from benchmarks.plots import Curve, draw_curves
from benchmarks.reporting import command_line, describe_run, markdown_table
from benchmarks.rounds import Pace, Timing, take_turns
from diffusion.arrays import to_numpy

CPU_BATCHES = (1, 2, 4, 8, 16, 32, 64)
CUDA_BATCHES = (*CPU_BATCHES, 128, 256)
QUICK_BATCHES = (1, 4)
QUICK = Pace(rounds=5, max_seconds=20)
KNEE = 0.95
"""The knee of a batch curve: the smallest batch with this part of the most rows per second."""
REFERENCE_ROWS = 4
"""Rows whose output is compared with PyTorch's in float32."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One contender at one batch size of one network."""

    network: str
    rows: int
    contender: str
    flops: int
    """Times of the entire call."""
    timing: Timing
    ceiling: float
    """FLOP/s that the machine reached in the same rounds, in the same precision."""
    error: float
    """Error of the output, relative to PyTorch in float32."""
    row_0: str
    """Hash of the first row's output, which is the same row in every batch."""

    @property
    def rows_per_second(self) -> float:
        """Rows per second of the median call."""
        return self.rows / self.timing.median

    @property
    def flop_rate(self) -> float:
        """FLOP/s of the median call."""
        return self.flops / self.timing.median


@dataclass(frozen=True)
class Absence:
    """A contender that was not measured."""

    network: str
    rows: int
    contender: str
    reason: str


Outcome = Cell | Absence


def measure(
    network: BenchNetwork, count: int, entries: Sequence[Entry], place: Place, pace: Pace
) -> tuple[list[Outcome], dict[str, Timing]]:
    """Time all contenders at one batch size, and free their memory afterwards.

    Returns:
        The result of each contender, in order, and the timings of the ceiling's probes.
    """
    rows = Rows.make(network.config, count)
    few = Rows.make(network.config, min(count, REFERENCE_ROWS))
    expected = reference_output(network, few)
    calls: dict[str, Call] = {}
    seen: dict[str, tuple[float, str]] = {}
    absent: dict[str, str] = {}
    for entry in entries:
        name = str(entry)
        say(f"{network.name}, batch {count}: loading {name}")
        try:
            call = open_contender(entry, network, rows, place)
        except Absent as reason:
            absent[name] = str(reason)
            continue
        out = to_numpy(call())
        calls[name] = call
        seen[name] = relative_error(out[: len(expected)], expected), hashlib.sha256(out[0].tobytes()).hexdigest()[:12]

    made = probes({entry.precision for entry in entries if str(entry) in calls}, place)
    say(f"{network.name}, batch {count}: {pace.rounds} rounds, or {pace.max_seconds:.0f} s")
    timings = take_turns({**calls, **{probe.name: probe.call for probe in made}}, pace)
    reached = ceilings(made, timings)
    outcomes: list[Outcome] = []
    for entry in entries:
        name = str(entry)
        if name in absent:
            outcomes.append(Absence(network.name, count, name, absent[name]))
            continue
        error, row_0 = seen[name]
        outcomes.append(
            Cell(
                network=network.name,
                rows=count,
                contender=name,
                flops=count * network.flops,
                timing=timings[name],
                ceiling=reached[entry.precision],
                error=error,
                row_0=row_0,
            )
        )
    return outcomes, {probe.name: timings[probe.name] for probe in made}


# --- The report -------------------------------------------------------------------------------------------------------


def knee(cells: Sequence[Cell]) -> int:
    """Return the smallest batch that gives `KNEE` of the most rows per second; cells of one network and contender."""
    most = max(cell.rows_per_second for cell in cells)
    return min(cell.rows for cell in cells if cell.rows_per_second >= KNEE * most)


def equal_bits(cells: Sequence[Cell]) -> str:
    """Describe the batch sizes at which row 0 is bit-identical to the largest; cells of one network and contender."""
    largest = max(cells, key=lambda cell: cell.rows)
    others = sorted(cell.rows for cell in cells if cell.row_0 != largest.row_0)
    return "all" if not others else f"all but {', '.join(map(str, others))}"


def by_contender(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group cells, in order of appearance."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.contender, []).append(cell)
    return groups


def summary_table(cells: Sequence[Cell]) -> str:
    """Write rows per second (and part of the ceiling) of one network: contenders by batches."""
    batches = sorted({cell.rows for cell in cells})
    lines = []
    for contender, own in by_contender(cells).items():
        found = {cell.rows: cell for cell in own}
        texts = [
            f"{found[b].rows_per_second:.1f} ({100 * found[b].flop_rate / found[b].ceiling:.0f} %)"
            if b in found
            else "-"
            for b in batches
        ]
        lines.append([contender, *texts, str(knee(own)), equal_bits(own)])
    return markdown_table(
        ["rows/s (of the ceiling)", *(f"batch {b}" for b in batches), "knee", "row 0 has equal bits at"], lines
    )


def detail_table(cells: Sequence[Cell]) -> str:
    """Write every number of one network."""
    return markdown_table(
        [
            "contender",
            "batch",
            "best ms",
            "median ms",
            "quartiles ms",
            "calls",
            "rows/s",
            "GFLOP/s",
            "ceiling",
            "error",
        ],
        [
            [
                cell.contender,
                str(cell.rows),
                f"{1e3 * cell.timing.best:.2f}",
                f"{1e3 * cell.timing.median:.2f}",
                "-".join(f"{1e3 * q:.2f}" for q in cell.timing.quartiles),
                str(len(cell.timing.seconds)),
                f"{cell.rows_per_second:.1f}",
                f"{cell.flop_rate / 1e9:.0f}",
                f"{cell.ceiling / 1e9:.0f}",
                f"{cell.error:.1e}",
            ]
            for cell in cells
        ],
    )


def absence_lines(absences: Sequence[Absence]) -> list[str]:
    """Describe contenders that were not measured, one line per contender and reason."""
    batches: dict[tuple[str, str], list[int]] = {}
    for absence in absences:
        batches.setdefault((absence.contender, absence.reason), []).append(absence.rows)
    return [
        f"- {contender} took no part (batch {', '.join(map(str, rows))}): {reason}"
        for (contender, reason), rows in batches.items()
    ]


def report(facts: dict[str, str], networks: Sequence[BenchNetwork], outcomes: Sequence[Outcome], command: str) -> str:
    """Write the section for RESULTS.md."""
    parts = [
        "## One network call",
        "",
        "Contenders are called in turns, after warming up; each batch size is compiled alone. A multiply-add counts "
        "as two operations. The ceiling is the best rate of 3x3 convolutions (256 channels, 32x32) in the same rounds "
        "and precision, by PyTorch and by OpenVINO, whole and in parts; on a GPU, of convolutions and of products of "
        "8192 x 8192 matrices. "
        "The error is that of the output, relative to PyTorch in float32. emb_t is an input, computed beforehand, "
        "except for diffusers, which embeds timesteps in every call. "
        f"The knee is the smallest batch with {100 * KNEE:.0f} % of the most rows per second.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    for network in networks:
        cells = [o for o in outcomes if isinstance(o, Cell) and o.network == network.name]
        absences = [o for o in outcomes if isinstance(o, Absence) and o.network == network.name]
        if not cells and not absences:
            continue
        parts += [f"### {network}", ""]
        if cells:
            parts += [summary_table(cells), "", detail_table(cells), ""]
        if absences:
            parts += [*absence_lines(absences), ""]
    return "\n".join([*parts, "```", command, "```", ""])


def curves(networks: Sequence[BenchNetwork], outcomes: Sequence[Outcome]) -> dict[str, list[Curve]]:
    """Return rows per second by batch size, a plot for each network that has any."""
    plots: dict[str, list[Curve]] = {}
    for network in networks:
        cells = [o for o in outcomes if isinstance(o, Cell) and o.network == network.name]
        lines = [
            Curve(
                name=contender,
                x=[cell.rows for cell in own],
                y=[cell.rows_per_second for cell in own],
                low=[cell.rows / cell.timing.quartiles[1] for cell in own],
                high=[cell.rows / cell.timing.quartiles[0] for cell in own],
            )
            for contender, own in by_contender(cells).items()
        ]
        if lines:
            plots[str(network)] = lines
    return plots


def write_results(
    out: Path,
    facts: dict[str, str],
    networks: Sequence[BenchNetwork],
    outcomes: Sequence[Outcome],
    probed: Sequence[dict[str, object]],
) -> None:
    """Write the section, the raw times and the plot."""
    out.mkdir(parents=True, exist_ok=True)
    command = command_line("benchmarks.denoise_step")
    raw = {"facts": facts, "command": command, "outcomes": [asdict(o) for o in outcomes], "probes": list(probed)}
    (out / "denoise_step.json").write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "denoise_step.md").write_text(report(facts, networks, outcomes, command), encoding="utf-8")
    draw_curves(curves(networks, outcomes), "rows per network call", "rows per second", out / "denoise_step.png")


# --- The command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Measure and write.

    Raises:
        ValueError: invalid options; the message gives the remedy.
    """
    place = place_of(args)
    on_cuda = place.device.type == "cuda"
    entries = [Entry.parse(text) for text in args.contenders or (CUDA_CONTENDERS if on_cuda else CPU_CONTENDERS)]
    default_batches = QUICK_BATCHES if args.quick else CUDA_BATCHES if on_cuda else CPU_BATCHES
    batches = sorted(set(args.batches or default_batches))
    if batches[0] < 1:
        raise ValueError(f"--batches must be at least 1; got {batches[0]}")
    names = args.networks or (NETWORKS[:1] if args.quick else NETWORKS)
    pace = QUICK if args.quick else Pace(rounds=args.rounds, max_seconds=args.max_seconds)
    facts = describe_run(place.device, place.threads)
    networks = [open_network(name, args.work) for name in names]

    outcomes: list[Outcome] = []
    probed: list[dict[str, object]] = []
    for network in networks:
        for count in batches:
            found, timings = measure(network, count, entries, place, pace)
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()
            outcomes += found
            probed += [
                {"network": network.name, "rows": count, "probe": name, **asdict(t)} for name, t in timings.items()
            ]
            write_results(args.out, facts, networks, outcomes, probed)
    print((args.out / "denoise_step.md").read_text(encoding="utf-8"), end="")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.denoise_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="the bundled model, two batch sizes, few rounds")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="(all)")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes (1 2 4 ... 64, on a GPU to 256)")
    parser.add_argument("--contenders", nargs="+", metavar="KIND:PRECISION", help="(all that the device has)")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each contender per batch size (15)")
    parser.add_argument(
        "--max-seconds", type=float, default=90, help="start no round after these seconds, except the first three (90)"
    )
    add_place_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(exit_status(run, parse_arguments()))
