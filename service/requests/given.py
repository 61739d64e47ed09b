"""Read images, masks, latents and conditioning images of a request. Slow: call `read_given` in the `EncodingPool`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from diffusion.conditioning import enlarged
from diffusion.config import CheckpointConfig, ModelConfig
from formats.given_shapes import Fit, GivenFileError, Shape
from formats.value_range import cond_range_of, value_range_of
from service.engine.request import GivenArrays
from service.errors import InvalidRequest
from service.requests.generate_request import MAX_IMAGES, GivenOptions
from service.requests.source import Source

T = TypeVar("T")

FLOAT_BYTES = 8
"""Of a number in a file: float64, as numpy makes it by default."""
TEXT_BYTES = 25
"""Of a number in a JSON list, with what separates it from the next: at most that of a float32 as Python writes it."""
MOST_TEXT_BYTES = 32 << 20
"""Bytes of JSON lists in a body, because they take several times that when they are parsed."""
LARGEST_VALUE = 1000.0
"""Of given arrays, in the units of the network."""
PICTURE_BYTES = 8 << 20
"""Bytes that a body with a picture may take for any model, because `fit` shrinks it."""


def shape_of(model: ModelConfig) -> Shape:
    """Return height, width and channels of a model's images."""
    return model.image_height, model.image_width, model.image_channels


def body_bytes(model: ModelConfig, *, as_lists: bool = False) -> int:
    """Return the bytes that the given arrays of a request for a model take, at most.

    Args:
        model: the model.
        as_lists: whether arrays may also be JSON lists; they are files in base64 otherwise.
    """
    height, width, channels = shape_of(model)
    cond = cond_file_shape(model)
    values = height * width * (channels + 1) + (0 if cond is None else math.prod(cond))
    lists = min(MOST_TEXT_BYTES, MAX_IMAGES * values * TEXT_BYTES) if as_lists else 0
    return max(PICTURE_BYTES, MAX_IMAGES * values * FLOAT_BYTES * 4 // 3, lists)


def cond_file_shape(model: ModelConfig) -> Shape | None:
    """Return height, width and channels of the conditioning image in requests for a model; None: it takes none."""
    shape = model.low_res_shape or model.cond_shape
    return None if shape is None else (shape[1], shape[2], shape[0])


def check_given(body: GivenOptions) -> None:
    """Check rules between the fields of given images, before any is read.

    Raises:
        InvalidRequest: a field needs another one, or excludes it.
    """
    given = {name for name in type(body).model_fields if getattr(body, name) is not None}
    if "latent" in given and (other := given & {"image", "mask", "strength", "resample"}):
        raise InvalidRequest(min(other), "is not valid with `latent`, which the chain begins with as it is")
    if "strength" in given and "start_timestep" in given:
        raise InvalidRequest("start_timestep", "give either `strength` or `start_timestep`, not both")
    if "start_timestep" in given and not given & {"image", "latent"}:
        raise InvalidRequest("start_timestep", "is valid only with `image` or `latent`")
    for name, needed in (("strength", "image"), ("mask", "image"), ("resample", "mask")):
        if name in given and needed not in given:
            raise InvalidRequest(name, f"is valid only with `{needed}`")
    if "fit" in given and not given & {"image", "cond"}:
        raise InvalidRequest("fit", "is valid only with `image` or `cond`")
    if "image" in given and not given & {"mask", "strength", "start_timestep"}:
        raise InvalidRequest("image", "needs `strength`, `start_timestep` or `mask`")


def check_cond(cond: Source | None, model: ModelConfig) -> None:
    """Check that a request has a conditioning image if and only if its model takes one.

    Raises:
        InvalidRequest: it does not; names the wanted shape.
    """
    shape = cond_file_shape(model)
    if shape is None and cond is not None:
        raise InvalidRequest("cond", "must be absent: the model takes no conditioning image")
    if shape is not None and cond is None:
        what = "the low-resolution image" if model.low_res_size is not None else "a conditioning image"
        raise InvalidRequest("cond", f"is required by the model: {what}, {_named(shape)}")


def read_given(body: GivenOptions, config: CheckpointConfig) -> tuple[GivenArrays, ...]:
    """Read the given arrays of a request: none, one for all images, or one per image.

    Args:
        body: of the request; `check_given` and `check_cond` have accepted it.
        config: of its model.

    Raises:
        InvalidRequest: a file cannot be read, or has another shape; names the field, the rule and what is wanted.
    """
    return with_cond(_read_begin(body, config), body.cond, config, body.fit)


def with_cond(
    begun: tuple[GivenArrays, ...], cond: Source | None, config: CheckpointConfig, fit: Fit | None
) -> tuple[GivenArrays, ...]:
    """Add the conditioning images of a request to what its chains begin with.

    Args:
        begun: none, one for all images, or one per image.
        cond: where they come from; None: the request has none.
        config: of the model.
        fit: how images of another shape are changed; None: they are refused.

    Raises:
        InvalidRequest: the file cannot be read, or has another shape or number of images.
    """
    if cond is None:
        return begun
    conds = _separate(_read_cond(cond, config, fit))
    if 1 not in (len(conds), len(begun) or 1) and len(conds) != len(begun):
        raise InvalidRequest("cond", f"must hold 1 or {len(begun)} images, as the other files; got {len(conds)}")
    if not begun:
        return tuple(GivenArrays(cond=array) for array in conds)
    count = max(len(begun), len(conds))
    return tuple(replace(begun[k % len(begun)], cond=conds[k % len(conds)]) for k in range(count))


def _read_cond(cond: Source, config: CheckpointConfig, fit: Fit | None) -> npt.NDArray[np.float32]:
    """Read conditioning images as the network takes them, [n, C', H, W]."""
    shape = cond_file_shape(config.model)
    assert shape is not None  # noqa: S101  # `check_cond`
    images = reading("cond", lambda: cond.images(shape, most=MAX_IMAGES, fit=fit))
    values = cond_values(images, config)
    _check_size("cond", values)
    return values


def cond_values(images: npt.NDArray[Any], config: CheckpointConfig) -> npt.NDArray[np.float32]:
    """Return conditioning images [n, h, w, C'], as `formats.given_files` reads them, as the network takes them.

    A low-resolution image is in the units of the data, and is enlarged. Others are in those of the model's cond_range.

    Returns:
        float32 [n, C', H, W].
    """
    model = config.model
    values = cond_range_of(config).to_network(images)
    return enlarged(values, model.image_height, model.image_width)


def _named(shape: Shape) -> str:
    height, width, channels = shape
    return f"{width} pixels wide and {height} high, of {channels} channel{'' if channels == 1 else 's'}"


def _read_begin(body: GivenOptions, config: CheckpointConfig) -> tuple[GivenArrays, ...]:
    """Read what chains begin with and keep."""
    shape = shape_of(config.model)
    image, mask, latent = body.image, body.mask, body.latent
    if latent is not None:
        latents = reading("latent", lambda: latent.values(shape, most=MAX_IMAGES))
        return begun_with("latent", latents.transpose(0, 3, 1, 2))
    if image is None:
        return ()
    images = reading("image", lambda: image.images(shape, most=MAX_IMAGES, fit=body.fit))
    masks: npt.NDArray[Any] | None = None
    if mask is not None:
        masks = reading("mask", lambda: mask.masks(shape, most=MAX_IMAGES, fit=body.fit))
        if len(images) != len(masks) and 1 not in (len(images), len(masks)):
            raise InvalidRequest("mask", f"must hold 1 or {len(images)} masks, as `image`; got {len(masks)}")
    return given_images(images, masks, config)


def given_images(
    images: npt.NDArray[Any], masks: npt.NDArray[np.float32] | None, config: CheckpointConfig
) -> tuple[GivenArrays, ...]:
    """Return the arrays of images as `formats.given_files` reads them, and of masks, one each or one for all."""
    ranges = value_range_of(config)
    values = ranges.to_network(images)
    _check_size("image", values)
    begins = _separate(values)
    if masks is None:
        return tuple(GivenArrays(image=image) for image in begins)
    levels, originals = _separate(masks[:, None]), _separate(ranges.data_of(images))
    return tuple(
        GivenArrays(image=begins[k % len(begins)], mask=levels[k % len(levels)], original=originals[k % len(originals)])
        for k in range(max(len(begins), len(levels)))
    )


def begun_with(field: str, arrays: npt.NDArray[np.float32]) -> tuple[GivenArrays, ...]:
    """Return arrays of the network, [n, C, H, W], as what chains begin with."""
    _check_size(field, arrays)
    return tuple(GivenArrays(image=array) for array in _separate(arrays))


def _separate(arrays: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Return each array in memory of its own: a slot may hold one long after the others have been released."""
    return [np.array(array, order="C") for array in arrays]


def reading(field: str, read: Callable[[], T]) -> T:
    """Return what a function reads.

    Raises:
        InvalidRequest: the file or array cannot be read; names the field.
    """
    try:
        return read()
    except GivenFileError as error:
        raise InvalidRequest(field, str(error)) from error


def _check_size(field: str, values: npt.NDArray[np.float32]) -> None:
    if np.abs(values).max(initial=0) > LARGEST_VALUE:
        raise InvalidRequest(field, f"must hold values of at most {LARGEST_VALUE:g} where data spans -1 to 1")
