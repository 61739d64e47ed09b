"""WaitingLine: images of one model and priority without a slot, with fast access to the most urgent ones."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Set

from service.engine.request import Image

_Images = list[tuple[float, int, Image]]
"""Images after the two numbers of their order. Flat tuples: nested ones take twice as long to compare."""
_LAST = (math.inf, 0)


class WaitingLine:
    """One sorted image list per client and row count, and indexes of these lists sorted by their first image.

    A search for images of one row, or of other clients first, skips whole lists. No image moves when a client becomes
    ahead or stops being ahead.
    """

    def __init__(self, ahead: Set[str]) -> None:
        """Keep a reference to `ahead`, the clients whose images come last regardless of their order."""
        self._ahead = ahead
        self._images: dict[tuple[str, int], _Images] = {}
        """Image lists by client and rows; no list is empty."""
        self._firsts: dict[tuple[bool, int], list[tuple[float, int, _Images]]] = {
            (ahead, rows): [] for ahead in (False, True) for rows in (1, 2)
        }
        """The same lists after the order of their first image, by (client is ahead, rows)."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Image]:
        return (image for images in self._images.values() for *_, image in images)

    def push(self, image: Image) -> None:
        """Add an image. Its order must not change until it is removed."""
        client, rows = image.request.client, image.rows
        firsts = self._firsts[client in self._ahead, rows]
        images = self._images.setdefault((client, rows), [])
        place = bisect_left(images, image.order)
        if place == 0 and images:
            del firsts[bisect_left(firsts, images[0][:2])]
        images.insert(place, (*image.order, image))
        self._count += 1
        if place == 0:
            insort(firsts, (*image.order, images))

    def remove(self, image: Image) -> None:
        """Remove an image from any position."""
        client, rows = image.request.client, image.rows
        images = self._images[client, rows]
        self._count -= 1
        if images[0][2] is not image:
            del images[bisect_left(images, image.order)]
            return
        del images[0]
        firsts = self._firsts[client in self._ahead, rows]
        place = bisect_left(firsts, image.order)
        del firsts[place]
        if images:
            insort(firsts, (*images[0][:2], images), lo=place)
        else:
            del self._images[client, rows]

    def front(self, rows: int) -> list[Image]:
        """Return images, unordered, that include the most urgent ones of each width, up to `rows` rows of it."""
        front: list[Image] = []
        for (_, width), firsts in self._firsts.items():
            if not firsts:
                continue
            count = -(-rows // width)
            lists = firsts[:count]
            limit = lists[-1][:2] if len(lists) == count else _LAST  # at least `count` images are no later than this
            for place, (_, _, images) in enumerate(lists):
                front.append(images[0][2])
                for entry in images[1 : count - place]:
                    if entry > limit:
                        break
                    front.append(entry[2])
        return front

    def moved(self, client: str) -> None:
        """Update the index after a client became ahead or stopped being ahead."""
        is_ahead = client in self._ahead
        for rows in (1, 2):
            images = self._images.get((client, rows))
            if images:
                order = images[0][:2]
                old = self._firsts[not is_ahead, rows]
                del old[bisect_left(old, order)]
                insort(self._firsts[is_ahead, rows], (*order, images))
