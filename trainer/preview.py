"""A grid of samples at each checkpoint, for people to look at while a run goes on."""

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
    """Draw a captioned grid of samples, each class a row; always the same seeds, so that grids can be compared.

    Args:
        network: in eval mode.
        config: what it is.
        per_class: images of a row.
        steps: respaced steps of ancestral sampling.
        device: where the network is.
        stop: asked before each row whether to give up; None is returned then.
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
    """Draw a preview with some weights, and write it as a PNG file, unless the run is asked to stop meanwhile.

    Raises:
        OSError: the file cannot be written; names it.
    """
    device = next(iter(weights.values())).device
    network = UNet(config.model).to(device).eval()
    network.load_state_dict(weights)
    with np.errstate(invalid="ignore"):  # images of a network that has hardly been trained may not be finite
        picture = preview(network, config, per_class, steps, device, stop)
    if picture is None:
        return
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    write_file(path, buffer.getvalue())
