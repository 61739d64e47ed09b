"""Draw a grid of samples at each checkpoint, to monitor a run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.config import CheckpointConfig
from diffusion.plans import ancestral_plan
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from formats.atomic_file import write_file
from formats.images import captioned_rows

PREVIEW_ROWS = 10


def preview(
    network: UNet,
    config: CheckpointConfig,
    per_class: int,
    steps: int,
    device: torch.device | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Image.Image | None:
    """Draw a captioned grid of samples, one row per class, with fixed seeds so that grids can be compared.

    Args:
        network: in eval mode.
        config: configuration of the checkpoint.
        per_class: images per row.
        steps: respaced steps of ancestral sampling.
        device: where the network is.
        stop: called before each row; True ends the function, which then returns None.
    """
    plan = ancestral_plan(config.diffusion, str(steps))
    names: Sequence[str] = config.class_names[:PREVIEW_ROWS] if config.class_names else [""] * PREVIEW_ROWS
    rows = []
    for index, name in enumerate(names):
        if stop():
            return None
        class_index = None if config.model.num_classes is None else index
        specs = [
            ImageSpec(seed=k, class_index=class_index, cfg_scale=config.sampling.cfg_scale)
            if config.class_names
            else ImageSpec(seed=k + index * per_class)
            for k in range(per_class)
        ]
        rows.append((name, sample_images(network, plan, specs, device=device)))
    return captioned_rows(rows)


def write_preview(
    path: Path,
    config: CheckpointConfig,
    weights: dict[str, Tensor],
    per_class: int,
    steps: int,
    stop: Callable[[], bool],
) -> None:
    """Draw a preview with the given weights and write it as a PNG file, unless `stop` returns True.

    Raises:
        OSError: the file cannot be written; names the file.
    """
    device = next(iter(weights.values())).device
    network = UNet(config.model).to(device).eval()
    network.load_state_dict(weights)
    with np.errstate(invalid="ignore"):  # images of a hardly trained network may not be finite
        picture = preview(network, config, per_class, steps, device, stop)
    if picture is None:
        return
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    write_file(path, buffer.getvalue())
