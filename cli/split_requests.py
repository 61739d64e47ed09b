"""Split the images of `iddpm sample` into requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from diffusion.noise import MAX_IMAGE_INDEX


def split_requests(
    params: dict[str, Any], n: int | None, at_once: int, class_names: Callable[[], Collection[str]]
) -> Iterator[dict[str, Any]]:
    """Yield the fields of each request; together the requests are n images of one seed.

    Args:
        params: fields of a request, including the seed; `image_index` is the index of the first image.
        n: number of images; None: one request, of which the given images say how many.
        at_once: most images per request.
        class_names: returns the model's class names. Called only if the class is a number, which is a class index
            unless a class has that name.

    Raises:
        ValueError: an image index is too large.
    """
    start = params.get("image_index", 0)
    if n is not None and start + n - 1 > MAX_IMAGE_INDEX:
        raise ValueError(f"image_index must be at most {MAX_IMAGE_INDEX - n + 1} with {n} images; got {start}")
    params = with_class_index(params, class_names)
    if n is None:
        yield params
        return
    for first in range(0, n, at_once):
        yield {**params, "n": min(at_once, n - first), "image_index": start + first}


def with_class_index(params: dict[str, Any], class_names: Callable[[], Collection[str]]) -> dict[str, Any]:
    """Return the fields of a request with an integer as the class, if that is the text of one and not a class's name.

    Args:
        params: fields of a request.
        class_names: returns the model's class names. Called only if the class is a number.
    """
    if params.get("class", "").isdigit() and params["class"] not in class_names():
        return {**params, "class": int(params["class"])}
    return params
