"""What `iddpm sample` asks for, wherever it is sampled: split into requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from diffusion.noise import MAX_IMAGE_INDEX


def requests(
    asked: dict[str, Any], n: int, at_once: int, class_names: Callable[[], Collection[str]]
) -> Iterator[dict[str, Any]]:
    """Yield the fields of one request after the other; together they are n images of one seed.

    Args:
        asked: fields of a request, the seed among them; `image_index` is that of the first image.
        n: images.
        at_once: most of them in a request.
        class_names: looks the model's up; called only for a class that is written as a number, which is the index of
            one unless it names one.

    Raises:
        ValueError: an image index beyond the largest one.
    """
    start = asked.get("image_index", 0)
    if start + n - 1 > MAX_IMAGE_INDEX:
        raise ValueError(f"image_index must be at most {MAX_IMAGE_INDEX - n + 1} with {n} images; got {start}")
    if asked.get("class", "").isdigit() and asked["class"] not in class_names():
        asked = {**asked, "class": int(asked["class"])}
    for first in range(0, n, at_once):
        yield {**asked, "n": min(at_once, n - first), "image_index": start + first}
