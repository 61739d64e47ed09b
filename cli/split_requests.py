"""Split the images of `iddpm sample` into requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.noise import MAX_IMAGE_INDEX

GIVEN = ("image", "mask", "latent", "cond")
"""Fields that hold a given file in base64, with one array for all images or one per image."""


def split_requests(
    params: dict[str, Any],
    n: int | None,
    at_once: int,
    class_names: Callable[[], Collection[str]],
    one_channel: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield the fields of each request; together the requests are n images of one seed.

    Each request gets those arrays of a given file that are of its images.

    Args:
        params: fields of a request, including the seed; `image_index` is the index of the first image.
        n: number of images; None: one request, of which the given images say how many.
        at_once: most images per request.
        class_names: returns the model's class names. Called only if the class is a number, which is a class index
            unless a class has that name.
        one_channel: given files whose arrays have one channel, whose axis may be left out.

    Raises:
        ValueError: an image index is too large; there are several requests, and a file holds neither one array nor n.
    """
    start = params.get("image_index", 0)
    if n is not None and start + n - 1 > MAX_IMAGE_INDEX:
        raise ValueError(f"image_index must be at most {MAX_IMAGE_INDEX - n + 1} with {n} images; got {start}")
    params = with_class_index(params, class_names)
    if n is None:
        yield params
        return
    stacks = _stacks(params, one_channel) if n > at_once else {}
    for name, stack in stacks.items():
        if len(stack) != n:
            raise ValueError(f"{name}: must hold 1 or {n} arrays; got {len(stack)}")
    for first in range(0, n, at_once):
        count = min(at_once, n - first)
        parts = {name: _npy(stack[first : first + count]) for name, stack in stacks.items()}
        yield {**params, **parts, "n": count, "image_index": start + first}


def _stacks(params: dict[str, Any], one_channel: Collection[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the given files that hold several arrays, as arrays [n, H, W, C] or, of one channel, [n, H, W].

    Other files are left out: pictures, and those of which the service says what is wrong.
    """
    stacks = {}
    for name in GIVEN:
        try:
            loaded = np.load(io.BytesIO(base64.b64decode(params.get(name, ""))), allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                array = loaded
            else:
                (member,) = ["arr_0"] if "arr_0" in loaded else loaded.files
                array = loaded[member]
        except Exception:  # noqa: S112  # numpy and zipfile raise many kinds for files that are no arrays
            continue
        without_channels = array.ndim == 3 and array.shape[2] != 1 and name in one_channel
        if len(array) > 1 and (array.ndim == 4 or without_channels):
            stacks[name] = array
    return stacks


def _npy(array: npt.NDArray[Any]) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def with_class_index(params: dict[str, Any], class_names: Callable[[], Collection[str]]) -> dict[str, Any]:
    """Return the fields of a request with an integer as the class, if that is the text of one and not a class's name.

    Args:
        params: fields of a request.
        class_names: returns the model's class names. Called only if the class is a number.
    """
    if params.get("class", "").isdigit() and params["class"] not in class_names():
        return {**params, "class": int(params["class"])}
    return params
