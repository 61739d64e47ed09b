"""What `iddpm sample` asks for, wherever it is sampled: split into requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any


def requests(
    asked: dict[str, Any], n: int, at_once: int, class_names: Callable[[], Collection[str]]
) -> Iterator[dict[str, Any]]:
    """Yield the fields of one request after the other; together they are n images of one seed.

    Args:
        asked: fields of a request, the seed among them.
        n: images.
        at_once: most of them in a request.
        class_names: looks the model's up; called only for a class that is written as a number, which is the index of
            one unless it names one.
    """
    if asked.get("class", "").isdigit() and asked["class"] not in class_names():
        asked = {**asked, "class": int(asked["class"])}
    for first in range(0, n, at_once):
        yield {**asked, "n": min(at_once, n - first), "image_index": first}
