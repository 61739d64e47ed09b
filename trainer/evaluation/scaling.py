"""The scaling study of the paper (section 6, figure 10): quality over training compute, for networks of several widths.

Each width trains once, and is evaluated at several numbers of training images. The folder of a study:

    plan.json               what is studied, except the widths; a study can only be resumed with an equal plan
    WIDTH/run/              the training run
    WIDTH/POINT/            evaluation after POINT training images
    results.json            measures by width and point, written after each evaluation; read by `iddpm plot`
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config import ModelConfig
from diffusion.unet import UNet
from formats.atomic_file import write_file
from formats.json_files import read_object
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.evaluation.errors import EvaluationError
from trainer.loop import resolve, train
from trainer.run_folder import MODEL_FOLDER, checkpoints, say

PLAN_FILE = "plan.json"
RESULTS_FILE = "results.json"
MEASURES = {"frechet_distance": "Fréchet distance", "bits_per_dim": "NLL (bits/dim)"}
"""Labels of the measures that can be plotted; smaller is better."""
LIMITS = 400
"""Values of the limit that are tried when a power law is fitted."""


class PowerLaw(NamedTuple):
    """L(C) = limit + (scale * C)^-exponent, the form of figure 10."""

    limit: float
    scale: float
    exponent: float


def width_config(base: TrainConfig, channels: int, images: int) -> TrainConfig:
    """Return the configuration of one width, trained on a number of images.

    The learning rate is scaled by sqrt(base / channels), as in the paper, and constant after its warm-up, so that
    stopping early equals a shorter run. A checkpoint is written only at the end.
    """
    scale = math.sqrt(base.model.model_channels / channels)
    changes: dict[str, Any] = {
        "model.model_channels": channels,
        "lr": base.lr * scale,
        "lr_schedule": "constant",
        "total_images": images,
        "checkpoint_every_images": images,
    }
    return base.with_overrides(changes)


def points_of(images: int, count: int, batch_size: int) -> list[int]:
    """Return numbers of training images, each about half of the next one, in whole batches; the last is `images`."""
    points = [math.ceil(images / 2**k / batch_size) * batch_size for k in reversed(range(count))]
    return sorted(set(points))


def training_flops(model: ModelConfig) -> int:
    """Return the floating-point operations of training on one image: forward and backward pass.

    Multiplications and additions count as two, as in the paper; only matrix products and convolutions are counted.
    """
    with torch.device("meta"):
        network = UNet(model).train()
        x = torch.zeros(1, *model.image_shape)
        embedded = torch.zeros(1, model.model_channels)
        y = None if model.num_classes is None else torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network.forward_emb(x, network.time_embed(embedded), y).sum().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def parameter_count(model: ModelConfig) -> int:
    """Return the number of weights of a network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(model).parameters())


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (compute, loss) with the lowest loss of all that took at most as much compute."""
    best: list[tuple[float, float]] = []
    for compute, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((compute, loss))
    return best


def fit_power_law(points: Sequence[tuple[float, float]], limit: float | None = None) -> PowerLaw | None:
    """Fit a power law to points (compute, loss) by least squares of log(loss - limit).

    Args:
        points: usually those of the `frontier`.
        limit: the loss of perfect samples, for example the distance of real images; None: fitted, which takes four
            points; a given one takes three.

    Returns:
        None if there are too few points above the limit, or the loss does not fall.
    """
    compute, loss = np.array(points, np.float64).reshape(-1, 2).T
    if limit is not None:
        found = _fit(compute, loss, limit)
        return None if found is None else found[0]
    if len(loss) < 4:
        return None
    lowest = float(loss.min())
    span = float(loss.max()) - lowest
    candidates = lowest - np.geomspace(1e-3, 1e1, LIMITS) * max(span, 1e-12)
    fits = [fit for value in candidates if value >= 0 and (fit := _fit(compute, loss, float(value))) is not None]
    return min(fits, key=lambda fit: fit[1])[0] if fits else None


def _fit(compute: Any, loss: Any, limit: float) -> tuple[PowerLaw, float] | None:
    """Return the law with a given limit, and its sum of squares relative to the loss; None: it does not fall."""
    above = [(c, value - limit) for c, value in zip(compute, loss, strict=True) if value > limit]
    if len(above) < 3:
        return None
    x, y = (np.log(np.array(values)) for values in zip(*above, strict=True))
    slope, intercept = np.polyfit(x, y, 1)
    if not slope < 0:
        return None
    law = PowerLaw(limit, float(np.exp(np.clip(intercept / slope, -700, 700))), float(-slope))
    predicted = limit + np.exp(intercept + slope * np.log(np.array(compute)))
    return law, float(((np.log(predicted) - np.log(np.array(loss))) ** 2).sum())


def refuse_unfit(base: TrainConfig) -> None:
    """Check that a configuration can be studied.

    Raises:
        EvaluationError: it is that of a classifier, or of a network that takes conditioning images; or its runs could
            end before the images of a point.
    """
    _network(base)
    if base.stop_after_worse is not None:
        raise EvaluationError(
            "stop_after_worse must be null in a scaling study, whose points are numbers of training images; "
            f"got {base.stop_after_worse}"
        )


def study(
    base: TrainConfig,
    dataset: Dataset,
    out: Path,
    *,
    widths: Sequence[int],
    images: int,
    count: int,
    evaluate: Callable[[Path, Path], Mapping[str, float]],
    limits: Mapping[str, float | None],
    settings: Mapping[str, Any],
    rows: int = 0,
    show: Callable[[Mapping[str, Any]], object] = lambda results: None,
    command: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train and evaluate networks of several widths; continue an interrupted study.

    Other widths may be given to continue: the results keep those that were studied before.

    Args:
        base: configuration; its width has its learning rate.
        dataset: to train on.
        out: folder of the study.
        widths: channels of the first level.
        images: training images per width.
        count: evaluations per width, each after twice as many images as the one before.
        evaluate: called with a checkpoint and a folder for its files; returns measures by name.
        limits: limit of the power law by measure; None: fitted.
        settings: all else that the measures depend on.
        rows: rows of network calls of one evaluation, for the estimate of the time that is left.
        show: called with the results after each evaluation.
        command: recorded with the results.
        stop: as for `train`.

    Returns:
        The content of results.json.

    Raises:
        EvaluationError: the folder holds another study, or the configuration or a width is not possible.
        TrainError, Stopped: as for `train`; the same command continues the study.
    """
    refuse_unfit(base)
    points = points_of(images, count, base.batch_size)

    def network_of(width: int) -> ModelConfig:
        return _network(resolve(width_config(base, width, points[-1]), dataset))

    try:
        networks = {width: network_of(width) for width in widths}
        for model in networks.values():
            parameter_count(model)
    except ValueError as error:
        raise EvaluationError(f"--widths {', '.join(map(str, widths))}: {error}") from error
    plan = {
        "config": base.model_dump(mode="json"),
        "data": dataset.description,
        "points": points,
        **settings,
    }
    _check_plan(out, plan)
    done = _earlier_results(out)
    left = _Left(networks, points, rows, done)
    networks |= {width: network_of(width) for width, _ in done}
    networks = dict(sorted(networks.items()))
    for number, width in enumerate(widths, start=1):
        run = out / str(width) / "run"
        for point in points:
            if (width, point) in done:
                continue
            say(f"{width} channels ({number} of {len(widths)} widths): training up to {point:,} of {images:,} images")
            if _images_seen(run) > point:
                raise EvaluationError(
                    f"{run} has seen more than {point} images, and {out / RESULTS_FILE} has no evaluation after "
                    f"{point}: delete {run.parent} to study this width again"
                )
            if _images_seen(run) < point:
                config = resolve(width_config(base, width, point), dataset)
                train(config, dataset, run, resume=bool(checkpoints(run)), command=command, stop=stop)
            measured = evaluate(run / MODEL_FOLDER, out / str(width) / f"{point:012d}")
            flops = float(point) * training_flops(networks[width])
            done[width, point] = {"images": point, "flops": flops, **measured}
            results = _summary(networks, done, limits, command)
            write_file(out / RESULTS_FILE, f"{json.dumps(results, indent=2)}\n".encode())
            show(results)
            values = ", ".join(f"{label} {measured[name]:.4g}" for name, label in MEASURES.items() if name in measured)
            say(f"{width} channels, {point:,} images: {values}; {left.after(width, point)}")
    return _summary(networks, done, limits, command)


class _Left:
    """Estimates the time that a study still takes, from the compute of what it has done since its start."""

    def __init__(
        self,
        networks: Mapping[int, ModelConfig],
        points: Sequence[int],
        rows: int,
        done: Mapping[tuple[int, int], object],
    ) -> None:
        self._begun = time.monotonic()
        self._left = {
            (width, point): training_flops(model) * (point - before + rows / 3)  # a forward pass is a third
            for width, model in networks.items()
            for before, point in zip([0, *points], points, strict=False)
            if (width, point) not in done
        }
        self._done = 0.0

    def after(self, width: int, point: int) -> str:
        """Count a point as done, and return what is left."""
        self._done += self._left.pop((width, point))
        seconds = (time.monotonic() - self._begun) * sum(self._left.values()) / self._done
        return (
            f"{len(self._left)} points left, about {math.ceil(seconds / 60)} min" if self._left else "all points done"
        )


def _network(config: TrainConfig) -> ModelConfig:
    model = config.model
    if not isinstance(model, ModelConfig):
        raise EvaluationError("a scaling study needs the configuration of a diffusion model")
    if model.cond_shape is not None:
        field = "model.cond_channels must be 0" if model.low_res_size is None else "model.low_res_size must be null"
        raise EvaluationError(f"{field} in a scaling study, whose samples have no conditioning images")
    return model


def _images_seen(run: Path) -> int:
    found = checkpoints(run)
    return int(found[-1].name) if found else 0


def _earlier_results(out: Path) -> dict[tuple[int, int], dict[str, float]]:
    """Return the measures of earlier evaluations by width and point."""
    if not (out / RESULTS_FILE).exists():
        return {}
    return {
        (network["channels"], point["images"]): point
        for network in read_object(out / RESULTS_FILE)["networks"]
        for point in network["points"]
    }


def _check_plan(out: Path, plan: Mapping[str, Any]) -> None:
    path = out / PLAN_FILE
    plan = json.loads(json.dumps(plan))
    if path.exists():
        earlier = {name: value for name, value in read_object(path).items() if name != "widths"}  # of older versions
        if changed := [name for name in {**earlier, **plan} if earlier.get(name) != plan.get(name)]:
            raise EvaluationError(f"{out} holds a study with other {', '.join(changed)}: use another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EvaluationError(f"{out} is not empty and holds no study: use another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_file(path, f"{json.dumps(plan, indent=2)}\n".encode())


def _summary(
    networks: Mapping[int, ModelConfig],
    done: Mapping[tuple[int, int], Mapping[str, float]],
    limits: Mapping[str, float | None],
    command: str,
) -> dict[str, Any]:
    measures: dict[str, Any] = {}
    for name, label in MEASURES.items():
        points = [(point["flops"], point[name]) for point in done.values() if name in point]
        if points:
            best = frontier(points)
            law = fit_power_law(best, limits.get(name))
            measures[name] = {
                "label": label,
                "fit": None if law is None else {**law._asdict(), "points": len(best)},
            }
    return {
        "kind": "scaling",
        "command": command,
        "measures": measures,
        "networks": [
            {
                "channels": width,
                "parameters": parameter_count(model),
                "flops_per_image": training_flops(model),
                "points": [dict(point) for (channels, _), point in sorted(done.items()) if channels == width],
            }
            for width, model in networks.items()
        ],
    }
