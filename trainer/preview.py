"""Draw a grid of samples at each checkpoint, to monitor a run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.config import CheckpointConfig
from diffusion.plans import SamplingPlan, ancestral_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from diffusion.update import to_uint8
from formats.atomic_file import write_file
from formats.images import Uint8Array, captioned_rows, side_by_side
from trainer.batches import conditions_of, read_pairs
from trainer.config import TrainConfig
from trainer.data import Dataset

PREVIEW_ROWS = 10


class Examples:
    """Images of the data with their conditioning images, in rows of `per_row`: a row per class, or of any images."""

    def __init__(self, config: TrainConfig, dataset: Dataset, per_row: int) -> None:
        self._config = config
        self._dataset = dataset
        self._labelled = config.model.num_classes is not None
        self._per_row = per_row
        count = len(dataset.labels)
        rows = np.unique(dataset.labels).tolist() if self._labelled else range(-(-count // per_row))
        self.rows: Sequence[int] = rows[:PREVIEW_ROWS]
        """The first classes that have an image; or numbers of rows."""

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

    Of a model that takes conditioning images, each sample stands between its condition and the image of the data.

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
    numbers = range(PREVIEW_ROWS if names is None else min(PREVIEW_ROWS, len(names)))
    rows = []
    for row in numbers if examples is None else examples.rows:
        if stop():
            return None
        specs = [
            ImageSpec(seed=k, class_index=row, cfg_scale=config.sampling.cfg_scale)
            if labelled
            else ImageSpec(seed=k + row * per_class)
            for k in range(per_class)
        ]
        drawn = (
            sample_images(network, plan, specs, device=device)
            if examples is None
            else _between(network, plan, specs, device, *examples.of_row(row))
        )
        rows.append(("" if names is None else names[row], drawn))
    return captioned_rows(rows)


def _between(
    network: UNet, plan: SamplingPlan, specs: Sequence[ImageSpec], device: torch.device | None, x0: Tensor, cond: Tensor
) -> Uint8Array:
    """Sample with conditioning images, and return each sample between its condition and the image of the data."""
    conditioned = [replace(spec, cond=one.numpy()) for spec, one in zip(specs, cond, strict=False)]
    return side_by_side([to_uint8(cond), sample_images(network, plan, conditioned, device=device), to_uint8(x0)])


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
