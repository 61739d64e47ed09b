"""A report of a run or of evaluations: one HTML page that needs no network, with tables, plots, grids and commands."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from formats.json_files import read_object
from trainer.evaluation.collected import Collected, Results
from trainer.evaluation.plots import plots_of
from trainer.evaluation.scores import table
from trainer.run_folder import MODEL_FOLDER

MOST_GRIDS = 6
"""Sample grids shown, spread evenly over the run; the last one is always shown."""
GRID_FILE = "grid.png"
CAPTIONS = {
    "loss_by_quartile": "Error of the predicted noise over training, for each quarter of the timesteps. Pale: single "
    "lines of the log; strong: means.",
    "objective_by_quartile": "The loss that is minimised over training, for each quarter of the timesteps.",
    "bound_by_quartile": "Terms of the variational bound over training, for each quarter of the timesteps.",
    "training": "Loss terms, norm of the gradient and learning rate over training.",
    "vlb_terms": "Terms of the variational bound by diffusion step (as figure 2 of arXiv:2102.09672).",
    "noise_scale": "Gradient noise scale by objective (as figure 7 of arXiv:2102.09672).",
    "noise_scale_training": "Gradient noise scale during training, from the micro-batches of each step.",
    "quality_over_compute": "Quality over training compute (as figure 10 of arXiv:2102.09672).",
}

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c1e21; --faint: #5c626b; --line: #d9dce1;
  --code: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181d; --ink: #d8dade; --faint: #9aa1ab; --line: #363a42; --code: #20242b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p.sub { margin: 0; color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
figure { margin: 1rem 0 1.8rem; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem; }
.grids figure { margin: 0; }
.grids img { width: 100%; image-rendering: pixelated; background: #fff; border: 1px solid var(--line); }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; margin: .4rem 0; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--faint); }
nav a { color: inherit; margin-right: 1.1rem; } nav { margin-top: .9rem; }
"""


def report(found: Collected) -> str:
    """Return the page as text.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    model = _model_config(found)
    parts: dict[str, str] = {}
    if facts := _facts(found, model):
        parts["Summary"] = facts
    if found.results:
        parts["Results"] = "".join(_results(results) for results in found.results)
    if plots := _plots(found):
        parts["Plots"] = plots
    if found.grids:
        parts["Samples over training"] = _grids(found)
    if commands := _commands(found, model):
        parts["Commands"] = "".join(f"<pre class=command>{html.escape(command)}</pre>" for command in commands)
    if found.config is not None:
        text = html.escape(json.dumps(found.config, indent=2))
        parts["Configuration"] = f"<details><summary>train_config.json</summary><pre>{text}</pre></details>"
    title = html.escape(found.name)
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in parts)
    body = "".join(f'<section><h2 id="{_anchor(name)}">{name}</h2>{part}</section>' for name, part in parts.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: iddpm report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main><header><h1>{title}</h1>"
        f'<p class="sub">Report of iddpm, written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>'
        f'<nav aria-label="Sections">{links}</nav></header>{body}</main></body></html>\n'
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _model_config(found: Collected) -> Mapping[str, Any]:
    try:
        return read_object(found.folder / MODEL_FOLDER / "config.json")
    except (OSError, ValueError):
        return {}


def _facts(found: Collected, model: Mapping[str, Any]) -> str:
    facts: dict[str, str] = {}
    provenance = model.get("provenance", {})
    if found.lines:
        last = found.lines[-1]
        facts["Images seen"] = f"{last['images']:,.0f}"
        if found.config is not None:
            facts["Images seen"] += f" of {found.config['total_images']:,}"
        for name, label in (("mse", "Mean squared error"), ("vb_bpd", "Term of the bound (bits/dim)")):
            if name in last:
                facts[f"{label}, last line"] = f"{last[name]:.4g}"
        speeds = sorted(line["images_per_second"] for line in found.lines if "images_per_second" in line)
        if speeds:
            facts["Images per second (median)"] = f"{speeds[len(speeds) // 2]:.3g}"
    if found.config is not None:
        network = found.config.get("model", {})
        shown = {name: network.get(name) for name in ("image_size", "image_channels", "model_channels", "channel_mult")}
        facts["Network"] = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
        facts["Objective"] = f"{found.config.get('loss')}, timesteps {found.config.get('timestep_sampler')}"
        facts["Batch size"] = str(found.config.get("batch_size"))
    if data := provenance.get("data"):
        facts["Data"] = ", ".join(f"{name} {value}" for name, value in data.items() if "sha256" not in name)
    for name, label in (("commit", "Commit"), ("precision", "Precision"), ("torch", "PyTorch")):
        if provenance.get(name):
            facts[label] = str(provenance[name])
    return _list(facts)


def _list(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _results(results: Results) -> str:
    content = results.content
    match results.kind:
        case "samples":
            kind = content["features"]["kind"]
            heading, body = table(content["results"], inception=kind == "inception")
            sampling = ", ".join(f"{name} {value}" for name, value in content["sampling"].items())
            reference = ", ".join(f"{name} {value}" for name, value in content["reference"].items())
            facts = {
                "Model": f"{content['model']}, {content.get('images_seen') or 'unknown number of'} training images",
                "Sampling": sampling,
                "Reference": reference,
                "Features": f"{kind}: {content['features']['file']}, sha256 {content['features']['sha256'][:12]}",
                "Date": str(content["date"]),
            }
            grid = results.path.parent / GRID_FILE
            picture = _figure(grid.read_bytes(), "The first images of each class") if grid.is_file() else ""
            return f"<h3>Samples</h3>{_table(heading, body)}<p></p>{_list(facts)}{picture}"
        case "nll":
            heading = ["model", "steps", "bits/dim", "standard error", "prior"]
            body = [
                [
                    str(model["name"]), str(model.get("num_steps", len(model["timesteps"]))),
                    _number(model["total_bpd"]["mean"], ".4f"), _number(model["total_bpd"].get("std_error"), ".4f"),
                    _number(model.get("prior_bpd", {}).get("mean"), ".2g"),
                ]
                for model in content["models"]
            ]  # fmt: skip
            return f"<h3>Likelihood ({content.get('images', '?')} images)</h3>{_table(heading, body)}"
        case "noise-scale":
            heading = ["loss", "timesteps", "noise scale (images)", "standard error"]
            body = [
                [
                    str(case["loss"]), str(case["timestep_sampler"]),
                    _number(case["noise_scale"]["value"], ".4g"), _number(case["noise_scale"]["std_error"], ".2g"),
                ]
                for case in content["cases"]
            ]  # fmt: skip
            return f"<h3>Gradient noise scale after {content.get('images_seen')} images</h3>{_table(heading, body)}"
    measures = content["measures"]
    heading = ["channels", "parameters", "images", "FLOPs", *(str(m["label"]) for m in measures.values())]
    body = [
        [
            str(network["channels"]), f"{network['parameters']:,.0f}", f"{point['images']:,}", f"{point['flops']:.3g}",
            *(_number(point.get(name), ".4g") for name in measures),
        ]
        for network in content["networks"]
        for point in network["points"]
    ]  # fmt: skip
    return f"<h3>Scaling</h3>{_table(heading, body)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(heading: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heading)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body)
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _plots(found: Collected) -> str:
    light, dark = plots_of([found], "light"), plots_of([found], "dark")
    figures = []
    for name, content in light.items():
        caption = CAPTIONS.get(name, "Quality over training compute")
        figures.append(_figure(content, caption, dark[name]))
    return "".join(figures)


def _figure(content: bytes, caption: str, dark: bytes | None = None) -> str:
    image = f'<img src="{_uri(content)}" alt="{html.escape(caption)}">'
    if dark is not None:
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
        image = f"<picture>{source}{image}</picture>"
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _grids(found: Collected) -> str:
    count = len(found.grids)
    chosen = sorted(
        {round(k * (count - 1) / max(1, MOST_GRIDS - 1)) for k in range(min(count, MOST_GRIDS))} | {count - 1}
    )
    shown = [found.grids[k] for k in chosen]
    figures = "".join(_figure(path.read_bytes(), f"after {images:,} images") for images, path in shown)
    return f"<div class=grids>{figures}</div>"


def _commands(found: Collected, model: Mapping[str, Any]) -> list[str]:
    commands = [model.get("provenance", {}).get("command")]
    commands += [results.content.get("command") for results in found.results]
    return list(dict.fromkeys(command for command in commands if command))


def write_report(path: Path, found: Collected) -> None:
    """Write the page.

    Raises:
        OSError: the file cannot be written.
    """
    from formats.atomic_file import write_file

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, report(found).encode())
