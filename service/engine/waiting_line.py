"""WaitingLine: images of one model and priority without a slot, with fast access to the most urgent ones."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set

from service.engine.request import Image, Order

_Images = list[tuple[Order, Image]]
_LAST: Order = (math.inf, 0)


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
        self._firsts: dict[tuple[bool, int], list[tuple[Order, _Images]]] = {
            (ahead, rows): [] for ahead in (False, True) for rows in (1, 2)
        }
        """The same lists with the order of their first image, by (client is ahead, rows)."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Image]:
        return (image for images in self._images.values() for _, image in images)

    def push(self, image: Image) -> None:
        """Add an image. Its order must not change until it is removed."""
        images = self._images.setdefault((image.client, image.rows), [])
        place = bisect_left(images, (image.order,))
        if place == 0 and images:
            self._forget_first(images, image.rows)
        images.insert(place, (image.order, image))
        self._count += 1
        if place == 0:
            self._note_first(images, image.client, image.rows)

    def remove(self, images: Iterable[Image]) -> None:
        """Remove images from any position. Removing the most urgent ones together costs little more than one."""
        leaving: dict[tuple[str, int], list[Image]] = {}
        for image in images:
            leaving.setdefault((image.client, image.rows), []).append(image)
        for (client, rows), gone in leaving.items():
            waiting = self._images[client, rows]
            self._forget_first(waiting, rows)
            if {image for _, image in waiting[: len(gone)]} == set(gone):
                del waiting[: len(gone)]
            else:
                for image in gone:
                    del waiting[bisect_left(waiting, (image.order,))]
            self._count -= len(gone)
            if waiting:
                self._note_first(waiting, client, rows)
            else:
                del self._images[client, rows]

    def front(self, count: int) -> list[Image]:
        """Return images, unordered, that include the `count` most urgent ones of each width."""
        front: list[Image] = []
        for firsts in filter(None, self._firsts.values()):
            lists = firsts[:count]
            limit = lists[-1][0] if len(lists) == count else _LAST  # at least `count` images are no later than this
            for place, (_, images) in enumerate(lists):
                for order, image in images[: count - place]:
                    if order > limit:
                        break
                    front.append(image)
        return front

    def moved(self, client: str) -> None:
        """Update the index after a client became ahead or stopped being ahead."""
        for rows in (1, 2):
            if (client, rows) in self._images:
                images = self._images[client, rows]
                self._forget_first(images, rows)
                self._note_first(images, client, rows)

    def _note_first(self, images: _Images, client: str, rows: int) -> None:
        order, _ = images[0]
        firsts = self._firsts[client in self._ahead, rows]
        firsts.insert(bisect_left(firsts, (order,)), (order, images))

    def _forget_first(self, images: _Images, rows: int) -> None:
        order, _ = images[0]
        for ahead in (False, True):  # the client may have been ahead or not when the list was indexed
            firsts = self._firsts[ahead, rows]
            place = bisect_left(firsts, (order,))
            if place < len(firsts) and firsts[place][1] is images:
                del firsts[place]
                return
