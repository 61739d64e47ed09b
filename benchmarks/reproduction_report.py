"""The report of the reproduction: whether each ordering of the paper held, tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import Curve, draw_curves
from benchmarks.reporting import markdown_table
from benchmarks.reproduction_cells import (
    EXTRA,
    FULL,
    NOISE_CASES,
    WIDTH_NLL_STEPS,
    WIDTH_STEPS,
    Cell,
    Options,
    read_cell,
    width_cells,
)
from benchmarks.reproduction_runs import (
    BASE_WIDTH,
    IMAGES,
    OTHER_WIDTHS,
    SCHEDULES,
    SEEDS,
    run_name,
    width_name,
)
from formats.atomic_file import write_file
from formats.json_files import read_object
from trainer.evaluation.folder import SETTINGS_FILE
from trainer.evaluation.plots import quality_over_compute
from trainer.evaluation.scaling import MEASURES, fit_power_law, frontier

NOT_RUN = "not run yet"
BEYOND = "beyond tables 1, 2"
"""Source of an ordering of the tables that is carried over to a model that they do not have."""
CLOSE = 1.15
"""Two Frechet distances are called close if their ratio is at most this; the paper's are within 1.07."""
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % quantile of Student's t by degrees of freedom."""
WIDTHS = tuple(sorted((BASE_WIDTH, *OTHER_WIDTHS)))
STEPS = (25, 50, 100)
"""Numbers of sampling steps that are compared. Full chains are measured in bits/dim only: sampling takes hours."""
FIGURE_8 = (
    ("L_hybrid, learned", "hybrid", "trained"),
    ("L_hybrid, beta-tilde", "hybrid", "fixed_small"),
    ("L_hybrid, beta", "hybrid", "fixed_large"),
    ("L_hybrid, DDIM", "hybrid", "ddim"),
    ("L_simple, beta-tilde", "simple", "trained"),
    ("L_simple, beta", "simple", "fixed_large"),
    ("L_simple, DDIM", "simple", "ddim"),
)
FIGURE_15 = (
    ("L_hybrid", "hybrid", "trained"),
    ("L_simple, beta-tilde", "simple", "trained"),
    ("L_simple, beta", "simple", "fixed_large"),
)
NOISE_MODELS = {"hybrid": "L_hybrid", "vlbuniform": "L_vlb (uniform)"}
Lookup = Callable[[Cell, str], float | None]
"""(cell, field) -> its value; None if it is not measured, or not known."""


@dataclass(frozen=True)
class Claim:
    """An ordering of the paper: `lower` is below `factor` times `higher`."""

    source: str
    text: str
    field: str
    lower: Callable[[int], Cell]
    """The cell of a seed."""
    higher: Callable[[int], Cell]
    factor: float = 1.0


def claims() -> list[Claim]:
    """Return the paper's orderings, in its order."""
    return [
        *_claims_of_tables(),
        *_claims_about_noise(),
        *_claims_of_figure_8(),
        *_claims_of_figure_15(),
        *_claims_of_figure_10(),
    ]


def _claims_of_tables() -> list[Claim]:
    """Compare every objective and schedule that was trained; the paper has no L_vlb with the linear schedule."""

    def source(*compared: tuple[str, str]) -> str:
        return BEYOND if ("vlb", "linear") in compared else "tables 1, 2"

    def bits(text: str, lower: tuple[str, str], higher: tuple[str, str]) -> Claim:
        cells = _trained("nll", *lower), _trained("nll", *higher)
        return Claim(source(lower, higher), f"bits/dim, {text}", "bits_per_dim", *cells)

    def frechet(text: str, lower: tuple[str, str], higher: tuple[str, str], factor: float = 1.0) -> Claim:
        left, right = (_cell("frechet", name, STEPS[-1], "trained", schedule) for name, schedule in (lower, higher))
        text = f"Frechet, {STEPS[-1]} steps, {text}"
        return Claim(source(lower, higher), text, "frechet_distance", left, right, factor)

    close = f"L_hybrid close to L_simple (ratio at most {CLOSE})"
    found = []
    for schedule in SCHEDULES:
        simple, hybrid, vlb = ((objective, schedule) for objective in ("simple", "hybrid", "vlb"))
        found += [
            bits(f"{schedule}: L_hybrid below L_simple", hybrid, simple),
            bits(f"{schedule}: L_vlb below L_hybrid", vlb, hybrid),
            frechet(f"{schedule}: {close}", hybrid, simple, CLOSE),
            frechet(f"{schedule}: L_hybrid below L_vlb", hybrid, vlb),
        ]
    for objective in ("simple", "hybrid", "vlb"):
        found.append(bits(f"L_{objective}: cosine below linear", (objective, "cosine"), (objective, "linear")))
    return found


def _claims_about_noise() -> list[Claim]:
    hybrid, vlb, uniform = (_trained("nll", name, "cosine") for name in ("hybrid", "vlb", "vlbuniform"))
    found = [
        Claim("figure 6", "bits/dim, L_vlb: importance sampling below uniform", "bits_per_dim", vlb, uniform),
        Claim("figure 6", "bits/dim: L_hybrid below L_vlb with uniform sampling", "bits_per_dim", hybrid, uniform),
    ]
    for model, name in NOISE_MODELS.items():
        objective, uniform, importance = (_cell("noise", model, FULL, case) for case in NOISE_CASES)
        text = f"tr(Sigma) of L_vlb on the {name} model: importance sampling below uniform"
        found.append(Claim("figure 6", text, "trace", importance, uniform))
        text = f"gradient noise scale on the {name} model: L_hybrid below L_vlb"
        found.append(Claim("figure 7", text, "noise_scale", objective, uniform))
    return found


def _claims_of_figure_8() -> list[Claim]:
    found = []
    for steps in STEPS:
        learned, ddim = _cell("frechet", "hybrid", steps, "trained"), _cell("frechet", "simple", steps, "ddim")
        for other, model, variant in FIGURE_8:
            if variant == "fixed_large" or (model, variant) in (("hybrid", "fixed_small"), ("simple", "trained")):
                text = f"Frechet, {steps} steps: L_hybrid, learned below {other}"
                higher = _cell("frechet", model, steps, variant)
                found.append(Claim("figure 8", text, "frechet_distance", learned, higher))
        if steps < 50:
            text, cells = "L_simple, DDIM below L_hybrid, learned", (ddim, learned)
        else:
            text, cells = "L_hybrid, learned below L_simple, DDIM", (learned, ddim)
        found.append(Claim("figure 8", f"Frechet, {steps} steps: {text}", "frechet_distance", *cells))
    return found


def _claims_of_figure_15() -> list[Claim]:
    found = []
    for steps in STEPS:
        strided, extra = (_cell("nll", "hybrid", steps, f"trained{suffix}") for suffix in ("", EXTRA))
        text = f"bits/dim, {steps} steps, L_hybrid: with appendix E's steps below without"
        found.append(Claim("figure 15", text, "bits_per_dim", extra, strided))
        for other, model, variant in FIGURE_15[1:]:
            text = f"bits/dim, {steps} steps and appendix E's: L_hybrid below {other}"
            higher = _cell("nll", model, steps, f"{variant}{EXTRA}")
            found.append(Claim("figure 15", text, "bits_per_dim", extra, higher))
    return found


def _claims_of_figure_10() -> list[Claim]:
    found = []
    for narrow, wide in pairwise(WIDTHS):
        for index, field, name in ((0, "frechet_distance", "Frechet"), (1, "bits_per_dim", "bits/dim")):
            text = f"{name}, equal images: {wide} channels below {narrow}"
            found.append(Claim("figure 10", text, field, _width(wide, index), _width(narrow, index)))
    return found


def _cell(kind: Any, objective: str, steps: int, variant: str, schedule: str = "cosine") -> Callable[[int], Cell]:
    return lambda seed: Cell(kind, run_name(objective, schedule, seed), steps, variant)


def _trained(kind: Any, objective: str, schedule: str) -> Callable[[int], Cell]:
    return _cell(kind, objective, FULL, "trained", schedule)


def _width(width: int, index: int) -> Callable[[int], Cell]:
    return lambda seed: width_cells(width_name(width, seed), None)[index]


@dataclass(frozen=True)
class Verdict:
    """What was measured of a claim: the ratio lower / higher of each seed."""

    ratios: tuple[float, ...]
    held: int
    """Seeds whose ratio is below the claim's factor."""

    @property
    def text(self) -> str:
        """Return the verdict in words."""
        if not self.ratios:
            return NOT_RUN
        count = len(self.ratios)
        if count == 1:
            return "held (one seed)" if self.held else "**did not hold** (one seed)"
        if self.held == count:
            return "held"
        return "**did not hold**" if self.held == 0 else f"**mixed**: held for {self.held} of {count} seeds"

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the geometric mean over seeds, by Student's t; None with one seed."""
        logs, count = np.log(self.ratios), len(self.ratios)
        if count < 2:
            return None
        half = T_95.get(count - 1, 1.96) * float(logs.std(ddof=1)) / math.sqrt(count)
        return math.exp(logs.mean() - half), math.exp(logs.mean() + half)


def judge_claim(claim: Claim, value: Lookup, seeds: Sequence[int] = SEEDS) -> Verdict:
    """Compare the two cells of each seed for which both are measured."""
    pairs = [(value(claim.lower(seed), claim.field), value(claim.higher(seed), claim.field)) for seed in seeds]
    ratios = tuple(low / high for low, high in pairs if low is not None and high is not None and low > 0 and high > 0)
    return Verdict(ratios, sum(ratio < claim.factor for ratio in ratios))


def write_report(results: Path, document: Path) -> None:
    """Write the document, and its plots to `images/` beside it, from the cells in a folder.

    Raises:
        ValueError: a file in the folder is damaged.
    """
    images = document.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    settings = read_object(results / SETTINGS_FILE) if (results / SETTINGS_FILE).exists() else {}

    def value(cell: Cell, field: str) -> float | None:
        found = (read_cell(results, cell) or {}).get(field)
        return found["value"] if isinstance(found, dict) else found

    plots = [
        _plot(
            images / "reproduction_frechet.png",
            "Frechet distance",
            FIGURE_8,
            "frechet",
            "frechet_distance",
            [""],
            value,
        ),
        _plot(images / "reproduction_nll.png", "bits/dim", FIGURE_15, "nll", "bits_per_dim", ["", EXTRA], value),
        _plot_widths(images / "reproduction_widths.png", results),
    ]
    drawn = [f"![{path.stem}](images/{path.name})" for path in plots if path is not None]
    text = "\n\n".join([*_introduction(settings), _claims(value), *_tables(value), *drawn])
    write_file(document, f"{text}\n".encode())


def _introduction(settings: dict[str, Any]) -> list[str]:
    numbers = {**Options().settings(), **settings}
    precision = "in float32, but sampled in bfloat16" if numbers["bfloat16"] else "in float32"
    return [
        "# The orderings of Improved DDPM, reproduced small",
        "Written by `python -m benchmarks.reproduction report`; `--help` of that module lists the three commands.",
        f"Fashion-MNIST at 32x32, unconditional, T = 1000, {BASE_WIDTH} channels (multipliers 1, 2, 2; one block per\n"
        f"level; no attention), {IMAGES:,} training images per run, seeds {', '.join(map(str, SEEDS))}, learning rate\n"
        "5e-4, EMA. The paper trained far larger networks with T = 4000 for up to 1.5 million steps of 128 images:\n"
        "only orderings are compared, not values. The widths share one learning rate; the paper scales it.",
        f"Bits/dim: {numbers['nll_images']} test images with equal noise for all models. Frechet distance:\n"
        f"{numbers['frechet_images']} samples with equal seeds, in the features of a small classifier\n"
        "(benchmarks/judge.py), against the test split; comparable within this document only. The EMA weights are\n"
        f"measured, {precision}. L_simple's models have fixed variances: beta-tilde and beta\n"
        "are both measured.",
    ]


def _claims(value: Lookup) -> str:
    rows = []
    for claim in claims():
        verdict = judge_claim(claim, value)
        interval = verdict.interval
        rows.append(
            [
                claim.source,
                claim.text,
                ", ".join(f"{ratio:.3f}" for ratio in verdict.ratios) or "-",
                "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
                verdict.text,
            ]
        )
    return (
        "## Orderings\n\n"
        "The ratio is that of the first quantity to the second: it holds below 1 (or the named ratio). The\n"
        "interval is that of the mean ratio over seeds, 95 %, by Student's t. With two seeds it is\n"
        "very wide: an ordering that held for both seeds may still be chance if the interval contains 1.\n"
        f'The paper has L_vlb with the cosine schedule only: "{BEYOND}" are the same orderings for the linear one.\n\n'
        + markdown_table(["paper", "ordering", "ratio by seed", "95 % interval", "result"], rows)
    )


def _tables(value: Lookup) -> list[str]:
    objectives = (
        ("L_simple, beta-tilde", "simple", "trained"),
        ("L_simple, beta", "simple", "fixed_large"),
        ("L_hybrid", "hybrid", "trained"),
        ("L_vlb, importance sampling", "vlb", "trained"),
        ("L_vlb, uniform", "vlbuniform", "trained"),
    )
    final = [
        [
            title,
            schedule,
            _by_seed(_cell("nll", model, FULL, variant, schedule), "bits_per_dim", value, 3),
            "-"
            if (variant, schedule) == ("fixed_large", "linear")
            else _by_seed(_cell("frechet", model, STEPS[-1], variant, schedule), "frechet_distance", value, 2),
        ]
        for title, model, variant in objectives
        for schedule in SCHEDULES
        if (model, schedule) != ("vlbuniform", "linear")
    ]
    noise = [
        [
            name,
            case,
            _by_seed(_cell("noise", model, FULL, case), "noise_scale", value, 1),
            _by_seed(_cell("noise", model, FULL, case), "trace", value, 4),
        ]
        for model, name in NOISE_MODELS.items()
        for case in NOISE_CASES
    ]
    widths = [
        [
            str(width),
            _by_seed(_width(width, 0), "frechet_distance", value, 2),
            _by_seed(_width(width, 1), "bits_per_dim", value, 3),
        ]
        for width in WIDTHS
    ]
    bounds = _by_steps(FIGURE_15, "nll", "bits_per_dim", value, ["", EXTRA], 3)
    return [
        "## Tables 1 and 2: objectives and schedules\n\n"
        f"One value per seed: bits/dim of the full chain, Frechet distance of {STEPS[-1]} sampling steps;\n"
        "-: not planned.",
        markdown_table(["objective", "schedule", "bits/dim", "Frechet"], final),
        "## Figures 6 and 7: gradient noise\n\n"
        "Of trained models; the curves of both figures over training were not reproduced.",
        markdown_table(["model", "loss and timesteps", "noise scale, images", "tr(Sigma)"], noise),
        "## Figure 8: Frechet distance by number of sampling steps",
        _by_steps(FIGURE_8, "frechet", "frechet_distance", value, [""], 2),
        f"## Figure 15: bits/dim by number of steps\n\n{bounds}",
        f"## Figure 10: widths\n\nTrained models; {WIDTH_STEPS} sampling steps, and {WIDTH_NLL_STEPS} steps of the\n"
        "bound with appendix E's.",
        markdown_table(["channels", "Frechet", "bits/dim"], widths),
    ]


def _by_steps(
    lines: Sequence[tuple[str, str, str]], kind: str, field: str, value: Lookup, suffixes: Sequence[str], digits: int
) -> str:
    has_full = kind == "nll"
    rows = [
        [
            f"{title}{', extra steps' if suffix else ''}",
            *(
                _by_seed(_cell(kind, model, steps, variant + suffix), field, value, digits)
                for steps in (*STEPS, *([FULL] if has_full and not suffix else []))
            ),
            *(["-"] if has_full and suffix else []),
        ]
        for title, model, variant in lines
        for suffix in suffixes
    ]
    return markdown_table(["model", *map(str, STEPS), *(["full chain"] if has_full else [])], rows)


def _by_seed(cell: Callable[[int], Cell], field: str, value: Lookup, digits: int) -> str:
    values = [value(cell(seed), field) for seed in SEEDS]
    if all(found is None for found in values):
        return NOT_RUN
    return ", ".join("-" if found is None else f"{found:.{digits}f}" for found in values)


def _plot(
    path: Path,
    label: str,
    lines: Sequence[tuple[str, str, str]],
    kind: str,
    field: str,
    suffixes: Sequence[str],
    value: Lookup,
) -> Path | None:
    """Draw means over seeds by number of steps, with the range over seeds."""
    curves = []
    for title, model, variant in lines:
        for suffix in suffixes:
            points = []
            for steps in (*STEPS, *([FULL] if kind == "nll" and not suffix else [])):
                values = [
                    v
                    for seed in SEEDS
                    if (v := value(_cell(kind, model, steps, variant + suffix)(seed), field)) is not None
                ]
                if values:
                    points.append((float(steps or 1000), float(np.mean(values)), min(values), max(values)))
            if points:
                x, y, low, high = zip(*points, strict=True)
                curves.append(Curve(name=f"{title}{', extra steps' if suffix else ''}", x=x, y=y, low=low, high=high))
    if not curves:
        return None
    return path if draw_curves({f"{label} by number of steps": curves}, "steps", label, path) else None


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
