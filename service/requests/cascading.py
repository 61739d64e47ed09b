"""Turn finished images of a cascade's base into conditioning images of its upsampler."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from diffusion.config import CheckpointConfig
from formats.value_range import value_range_of
from service.engine.request import ImageParams, ImageResult, NextStage, Output
from service.models.served_model import ServedModel
from service.requests.given import cond_values
from service.requests.results import output_of

EIGHT_BITS = (0.0, 255.0)
FLOAT_BYTES = 4


def output_of_base(base: CheckpointConfig) -> Output:
    """Return what the images of a base become between the stages: pixels if its data has eight bits, else values."""
    return "pixels" if all(tuple(bounds) == EIGHT_BITS for bounds in base.channel_ranges) else "values"


def next_stage(base: CheckpointConfig, upsampler: ServedModel, images: tuple[ImageParams, ...]) -> NextStage:
    """Return the second stage of a request to a cascade.

    Args:
        base: configuration of the base.
        upsampler: model of the second stage.
        images: of the second stage.
    """
    network = upsampler.config.model
    return NextStage(
        model=upsampler.engine_id,
        images=images,
        cond_of=partial(_cond_of, base, upsampler.config),
        cond_bytes=network.image_channels * network.image_height * network.image_width * FLOAT_BYTES,
    )


def _cond_of(
    base: CheckpointConfig, upsampler: CheckpointConfig, params: ImageParams, result: ImageResult
) -> npt.NDArray[np.float32]:
    """Return what a client would get that sent the base's answer, as a file, to the upsampler as `cond`."""
    image = output_of(params, result, value_range_of(base))
    cond: npt.NDArray[np.float32] = cond_values(image[None], upsampler)[0]
    return cond
