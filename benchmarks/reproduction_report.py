"""The report of the reproduction: a document with verdicts, tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting import markdown_table
from benchmarks.reproduction_cells import (
    CURVES,
    EXTRA,
    FULL,
    NOISE_CASES,
    WIDTH_NLL_STEPS,
    WIDTH_STEPS,
    Cell,
    Options,
    read_cell,
)
from benchmarks.reproduction_claims import (
    BEYOND,
    FIGURE_8,
    FIGURE_15,
    NOISE_MODELS,
    NOT_RUN,
    STEPS,
    WIDTHS,
    Lookup,
    cell_of,
    claims,
    judge_claim,
    trained,
    width_of,
)
from benchmarks.reproduction_plots import TRAINED, draw_plots
from benchmarks.reproduction_runs import BASE_WIDTH, IMAGES, SCHEDULES, SEEDS
from formats.atomic_file import write_file
from formats.json_files import read_object
from trainer.evaluation.folder import SETTINGS_FILE

CURVE_FIELDS = {"bits_per_dim": "bits/dim", "spread": "spread, bits/dim"}


def write_report(results: Path, document: Path) -> None:
    """Write the document, and its plots to `images/` beside it, from the cells in a folder.

    Raises:
        ValueError: a file in the folder is damaged.
    """
    images = document.parent / "images"
    settings = read_object(results / SETTINGS_FILE) if (results / SETTINGS_FILE).exists() else {}

    def value(cell: Cell, field: str) -> float | None:
        found = (read_cell(results, cell) or {}).get(field)
        return found["value"] if isinstance(found, dict) else found

    drawn = [f"![{path.stem}](images/{path.name})" for path in draw_plots(results, images, value)]
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
            _by_seed(cell_of("nll", model, FULL, variant, schedule), "bits_per_dim", value, 3),
            "-"
            if (variant, schedule) == ("fixed_large", "linear")
            else _by_seed(cell_of("frechet", model, STEPS[-1], variant, schedule), "frechet_distance", value, 2),
        ]
        for title, model, variant in objectives
        for schedule in SCHEDULES
        if (model, schedule) != ("vlbuniform", "linear")
    ]
    own = [(name, [case]) for name, case in CURVES.items() if name not in NOISE_MODELS]
    noise = [
        [
            TRAINED[name],
            case,
            _by_seed(cell_of("noise", name, FULL, case), "noise_scale", value, 1),
            _by_seed(cell_of("noise", name, FULL, case), "trace", value, 4),
        ]
        for name, cases in [*((name, NOISE_CASES) for name in NOISE_MODELS), *own]
        for case in cases
    ]
    curves = [
        [TRAINED[name], *(_by_seed(trained("curves", name, "cosine"), field, value, 3) for field in CURVE_FIELDS)]
        for name in CURVES
    ]
    widths = [
        [
            str(width),
            _by_seed(width_of(width, 0), "frechet_distance", value, 2),
            _by_seed(width_of(width, 1), "bits_per_dim", value, 3),
        ]
        for width in WIDTHS
    ]
    bounds = _by_steps(FIGURE_15, "nll", "bits_per_dim", value, ["", EXTRA], 3)
    return [
        "## Tables 1 and 2: objectives and schedules\n\n"
        f"One value per seed: bits/dim of the full chain, Frechet distance of {STEPS[-1]} sampling steps;\n"
        "-: not planned.",
        markdown_table(["objective", "schedule", "bits/dim", "Frechet"], final),
        "## Figures 6 and 7: curves over training, and gradient noise\n\n"
        "Of the second half of each run, with the weights of the moment: the bound on training images, and the\n"
        "standard deviation of the log's lines (320 images each) around it. In its plot, a line is the mean over\n"
        "seeds; its band holds both seeds and four fifths of the log's lines. Importance sampling begins when every\n"
        "timestep was drawn ten times.",
        markdown_table(["trained with", *CURVE_FIELDS.values()], curves),
        "Of trained models, averaged weights; -: the gradient is lost in the noise. The plot has the noise scale of\n"
        "each model with its own loss, at its checkpoints.",
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
                _by_seed(cell_of(kind, model, steps, variant + suffix), field, value, digits)
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
