"""The orderings of the paper that the reproduction compares, and whether they held."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.reproduction_cells import CURVES, EXTRA, FULL, NOISE_CASES, Cell, width_cells
from benchmarks.reproduction_runs import BASE_WIDTH, OTHER_WIDTHS, SCHEDULES, SEEDS, run_name, width_name

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
"""Models whose gradient noise is measured with each loss."""
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
        cells = trained("nll", *lower), trained("nll", *higher)
        return Claim(source(lower, higher), f"bits/dim, {text}", "bits_per_dim", *cells)

    def frechet(text: str, lower: tuple[str, str], higher: tuple[str, str], factor: float = 1.0) -> Claim:
        left, right = (cell_of("frechet", name, STEPS[-1], "trained", schedule) for name, schedule in (lower, higher))
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
    hybrid, vlb, uniform = (trained("nll", name, "cosine") for name in ("hybrid", "vlb", "vlbuniform"))
    found = [
        Claim("figure 6", "bits/dim, L_vlb: importance sampling below uniform", "bits_per_dim", vlb, uniform),
        Claim("figure 6", "bits/dim: L_hybrid below L_vlb with uniform sampling", "bits_per_dim", hybrid, uniform),
    ]
    hybrid, uniform, importance = (trained("curves", name, "cosine") for name in CURVES)
    text = "curve of L_hybrid below that of L_vlb (uniform), bits/dim"
    found.append(Claim("figure 6", text, "bits_per_dim", hybrid, uniform))
    text = "curve of L_vlb: importance sampling below uniform, bits/dim"
    found.append(Claim("figure 6", text, "bits_per_dim", importance, uniform))
    text = "spread of L_vlb's curve: importance sampling below uniform"
    found.append(Claim("figure 6", text, "spread", importance, uniform))
    hybrid, uniform = (cell_of("noise", name, FULL, CURVES[name]) for name in ("hybrid", "vlbuniform"))
    text = "gradient noise scale, each model with its own loss: L_hybrid below L_vlb (uniform)"
    found.append(Claim("figure 7", text, "noise_scale", hybrid, uniform))
    for model, name in NOISE_MODELS.items():
        objective, uniform, importance = (cell_of("noise", model, FULL, case) for case in NOISE_CASES)
        text = f"tr(Sigma) of L_vlb on the {name} model: importance sampling below uniform"
        found.append(Claim("figure 6", text, "trace", importance, uniform))
        text = f"gradient noise scale on the {name} model: L_hybrid below L_vlb"
        found.append(Claim("figure 7", text, "noise_scale", objective, uniform))
    return found


def _claims_of_figure_8() -> list[Claim]:
    found = []
    for steps in STEPS:
        learned, ddim = cell_of("frechet", "hybrid", steps, "trained"), cell_of("frechet", "simple", steps, "ddim")
        for other, model, variant in FIGURE_8:
            if variant == "fixed_large" or (model, variant) in (("hybrid", "fixed_small"), ("simple", "trained")):
                text = f"Frechet, {steps} steps: L_hybrid, learned below {other}"
                higher = cell_of("frechet", model, steps, variant)
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
        strided, extra = (cell_of("nll", "hybrid", steps, f"trained{suffix}") for suffix in ("", EXTRA))
        text = f"bits/dim, {steps} steps, L_hybrid: with appendix E's steps below without"
        found.append(Claim("figure 15", text, "bits_per_dim", extra, strided))
        for other, model, variant in FIGURE_15[1:]:
            text = f"bits/dim, {steps} steps and appendix E's: L_hybrid below {other}"
            higher = cell_of("nll", model, steps, f"{variant}{EXTRA}")
            found.append(Claim("figure 15", text, "bits_per_dim", extra, higher))
    return found


def _claims_of_figure_10() -> list[Claim]:
    found = []
    for narrow, wide in pairwise(WIDTHS):
        for index, field, name in ((0, "frechet_distance", "Frechet"), (1, "bits_per_dim", "bits/dim")):
            text = f"{name}, equal images: {wide} channels below {narrow}"
            found.append(Claim("figure 10", text, field, width_of(wide, index), width_of(narrow, index)))
    return found


def cell_of(kind: Any, objective: str, steps: int, variant: str, schedule: str = "cosine") -> Callable[[int], Cell]:
    """Return the cell of a run of each seed."""
    return lambda seed: Cell(kind, run_name(objective, schedule, seed), steps, variant)


def trained(kind: Any, objective: str, schedule: str) -> Callable[[int], Cell]:
    """Return the cell of the full chain of a trained model of each seed."""
    return cell_of(kind, objective, FULL, "trained", schedule)


def width_of(width: int, index: int) -> Callable[[int], Cell]:
    """Return one of the two `width_cells` of each seed's trained model."""
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
