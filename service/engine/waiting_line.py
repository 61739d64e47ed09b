"""WaitingLine: images without a slot, of one model and priority; the most urgent one, quickly."""

from __future__ import annotations

from collections.abc import Iterator, Set
from heapq import heapify, heappop, heappush

from service.engine.request import Image, Order

_Head = tuple[Order, str]
SLACK = 64
"""Outdated entries a heap may hold before it is worth cleaning."""


class _Flow:
    """The waiting images of one client that take the same number of rows."""

    def __init__(self) -> None:
        self.images: list[tuple[Order, Image]] = []  # heap; may hold images that have left the line
        self.gone = 0


class WaitingLine:
    """Heaps of images by client and rows, and heaps of their heads: nothing costs more than a few logarithms.

    Looking for something narrow, or for other clients first, skips all of a flow's images at once. Entries that no
    longer hold are dropped when they come to the top, or when they are half of their heap.
    """

    def __init__(self, ahead: Set[str]) -> None:
        """Watch `ahead`, the clients whose images come last, whatever their order."""
        self._ahead = ahead
        self._members: set[Image] = set()
        self._flows: dict[tuple[str, int], _Flow] = {}
        self._heads: dict[tuple[bool, int], list[_Head]] = {(a, r): [] for a in (False, True) for r in (1, 2)}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Image]:
        return iter(self._members)

    def push(self, image: Image) -> None:
        """Let an image wait; its order must not change until it leaves."""
        rows = image.rows
        flow = self._flows.setdefault((image.client, rows), _Flow())
        self._members.add(image)
        heappush(flow.images, (image.order, image))
        if flow.images[0][1] is image:
            self._push_head(image.client, rows)

    def remove(self, image: Image) -> None:
        """Take an image out, wherever it stands."""
        self._members.remove(image)
        rows = image.rows
        flow = self._flows[image.client, rows]
        if flow.images[0][1] is image:
            self._drop_head(image.client, rows)
            return
        flow.gone += 1
        if 2 * flow.gone > len(flow.images) + SLACK:
            flow.images = [entry for entry in flow.images if entry[1] in self._members]
            heapify(flow.images)
            flow.gone = 0

    def first(self, most_rows: int) -> Image | None:
        """Return the most urgent image of at most so many rows; of a client that is ahead only for want of others."""
        for ahead in (False, True):
            narrow = self._first(ahead, 1)
            wide = self._first(ahead, 2) if most_rows >= 2 else None
            if narrow is not None and wide is not None:
                return narrow if narrow.order < wide.order else wide
            if narrow is not None or wide is not None:
                return narrow or wide
        return None

    def moved(self, client: str) -> None:
        """Take note that a client began or ceased to be ahead."""
        for rows in (1, 2):
            if (client, rows) in self._flows:
                self._push_head(client, rows)

    def _first(self, ahead: bool, rows: int) -> Image | None:
        heads = self._heads[ahead, rows]
        while heads:
            order, client = heads[0]
            flow = self._flows.get((client, rows))
            if flow is not None and flow.images[0][0] == order and (client in self._ahead) is ahead:
                return flow.images[0][1]
            heappop(heads)  # whoever leads this flow by now has an entry of its own, where it belongs
        return None

    def _drop_head(self, client: str, rows: int) -> None:
        flow = self._flows[client, rows]
        heappop(flow.images)
        while flow.images and flow.images[0][1] not in self._members:
            heappop(flow.images)
            flow.gone -= 1
        if flow.images:
            self._push_head(client, rows)
        else:
            del self._flows[client, rows]

    def _push_head(self, client: str, rows: int) -> None:
        ahead = client in self._ahead
        heads = self._heads[ahead, rows]
        heappush(heads, (self._flows[client, rows].images[0][0], client))
        if len(heads) > 2 * len(self._flows) + SLACK:
            heads[:] = [
                (flow.images[0][0], who)
                for (who, width), flow in self._flows.items()
                if width == rows and (who in self._ahead) is ahead
            ]
            heapify(heads)
