"""Draw a grid of samples at each checkpoint, to monitor a run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion.config import CheckpointConfig
from diffusion.plans import ancestral_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from diffusion.update import to_uint8
from formats.atomic_file import write_file
from formats.images import Uint8Array, captioned_rows, side_by_side
from trainer.batches import conditions_of, read_pairs
from trainer.config import TrainConfig
from trainer.data import Dataset

PREVIEW_ROWS = 10
"""Rows of a grid at most; of more classes, some are shown, spread evenly over all."""


class Examples:
    """Images of the data with their conditioning images, in rows of `per_row`: a row per class, or of any images."""

    def __init__(self, config: TrainConfig, dataset: Dataset, per_row: int) -> None:
        self._config = config
        self._dataset = dataset
        self._labelled = config.model.num_classes is not None
        self._per_row = per_row
        count = len(dataset.labels)
        self.rows: Sequence[int] = (
            spread(np.unique(dataset.labels).tolist()) if self._labelled else range(-(-count // per_row))[:PREVIEW_ROWS]
        )
        """Classes that have an image; or numbers of rows."""

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Return the images of a row, [n, C, H, W], and their conditioning images; n is at most `per_row`.

        Raises:
            DataError: an image cannot be read.
        """
        if self._labelled:
            indices = np.flatnonzero(self._dataset.labels == row)[: self._per_row]
        else:
            indices = np.arange(len(self._dataset.labels))[row * self._per_row : (row + 1) * self._per_row]
        x0, cond = read_pairs(self._dataset, indices)
        return x0, conditions_of(self._config.model, x0, cond)["cond"]


def spread(classes: Sequence[int]) -> Sequence[int]:
    """Return at most PREVIEW_ROWS of the classes, evenly spread from the first to the last one."""
    if len(classes) <= PREVIEW_ROWS:
        return classes
    return [classes[position] for position in np.linspace(0, len(classes) - 1, PREVIEW_ROWS).round().astype(int)]


def preview(
    network: UNet,
    config: CheckpointConfig,
    per_class: int,
    steps: int,
    device: torch.device | None = None,
    stop: Callable[[], bool] = lambda: False,
    examples: Examples | None = None,
) -> Image.Image | None:
    """Draw a captioned grid of samples, one row per class, with fixed seeds so that grids can be compared.

    Of a model that takes conditioning images, each sample stands between its condition and the image of the data. At a
    terminal, a second progress bar counts the sampling steps.

    Args:
        network: in eval mode.
        config: configuration of the checkpoint.
        per_class: images per row.
        steps: respaced steps of ancestral sampling.
        device: where the network is.
        stop: called before each row; True ends the function, which then returns None.
        examples: the conditioning images, for a model that takes them.
    """
    plan = ancestral_plan(config.diffusion, str(steps))
    names, labelled = config.class_names, config.model.num_classes is not None
    numbers = range(PREVIEW_ROWS) if names is None else spread(range(len(names)))
    chosen = numbers if examples is None else examples.rows
    rows = []
    with tqdm(
        total=len(chosen) * plan.num_steps, desc="sample grid", unit="step", leave=False, dynamic_ncols=True,
        disable=None,
    ) as bar:  # fmt: skip

        def advance(_step: int, _result: object) -> None:
            bar.update()

        for row in chosen:
            if stop():
                return None
            specs = [
                ImageSpec(seed=k, class_index=row, cfg_scale=config.sampling.cfg_scale)
                if labelled
                else ImageSpec(seed=k + row * per_class)
                for k in range(per_class)
            ]
            sample = partial(sample_images, network, plan, on_step=advance, device=device)
            drawn = sample(specs) if examples is None else _between(sample, specs, *examples.of_row(row))
            rows.append(("" if names is None else names[row], drawn))
    return captioned_rows(rows)


def _between(
    sample: Callable[[list[ImageSpec]], Uint8Array], specs: Sequence[ImageSpec], x0: Tensor, cond: Tensor
) -> Uint8Array:
    """Sample with conditioning images, and return each sample between its condition and the image of the data."""
    conditioned = [replace(spec, cond=one.numpy()) for spec, one in zip(specs, cond, strict=False)]
    return side_by_side([to_uint8(cond), sample(conditioned), to_uint8(x0)])


def write_preview(
    path: Path,
    config: CheckpointConfig,
    weights: dict[str, Tensor],
    per_class: int,
    steps: int,
    stop: Callable[[], bool],
    examples: Examples | None = None,
) -> None:
    """Draw a preview with the given weights and write it as a PNG file, unless `stop` returns True.

    Raises:
        OSError: the file cannot be written; names the file.
    """
    device = next(iter(weights.values())).device
    network = UNet(config.model).to(device).eval()
    network.load_state_dict(weights)
    with np.errstate(invalid="ignore"):  # images of a hardly trained network may not be finite
        picture = preview(network, config, per_class, steps, device, stop, examples)
    if picture is None:
        return
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    write_file(path, buffer.getvalue())
