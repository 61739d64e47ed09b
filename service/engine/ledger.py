"""Ledger: the account of accepted work. Limits, predictions, and the ends of requests and models read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from service.engine.ordered_work import OrderedWork
from service.engine.request import Image, Order, Priority


@dataclass(frozen=True)
class Line:
    """Accepted work of one model and priority."""

    work: OrderedWork = field(default_factory=OrderedWork)
    """Row-steps of each image, by its order."""
    clients: Counter[str] = field(default_factory=Counter)
    """Row-steps of each client that has images in it."""


@dataclass
class ModelWork:
    """Accepted work of one model."""

    rows: int = 0
    classified_rows: int = 0
    interactive: Line = field(default_factory=Line)
    batch: Line = field(default_factory=Line)

    @property
    def row_steps(self) -> int:
        """Work of all its images."""
        return self.interactive.work.work + self.batch.work.work

    def line(self, priority: Priority) -> Line:
        """Return the work of a priority."""
        return self.batch if priority is Priority.BATCH else self.interactive


@dataclass
class ClientWork:
    """Accepted work of one client."""

    rows: int = 0
    images: int = 0


class Ledger:
    """Accepted images that have not ended, as they were when they were accepted. Belongs to the event loop.

    How far they have come since is in `Snapshot`.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self.rows = 0
        """Rows of all accepted images."""
        self._orders: dict[Image, Order] = {}
        self._models = {model: ModelWork() for model in models}
        self._clients: dict[str, ClientWork] = {}
        self._requests: dict[str, dict[int, Image]] = {}

    @property
    def orders(self) -> Mapping[Image, Order]:
        """Return every accepted image with the order that it had on arrival."""
        return self._orders

    @property
    def models(self) -> Mapping[str, ModelWork]:
        """Return the work of every model that is held, accepting requests or not."""
        return self._models

    @property
    def requests(self) -> int:
        """Return how many requests have images in it."""
        return len(self._requests)

    def client(self, name: str) -> ClientWork:
        """Return the work of a client, which may have none."""
        return self._clients.get(name, ClientWork())

    def unfinished(self, request_id: str) -> Collection[Image]:
        """Return those images of a request that have not ended."""
        return self._requests.get(request_id, {}).values()

    def add_model(self, model: str) -> None:
        """Make room for a model. Every `Snapshot` that is read with this must know it."""
        self._models[model] = ModelWork()

    def remove_model(self, model: str) -> None:
        """Forget a model whose images have all ended; a `Snapshot` may know it for a while."""
        del self._models[model]

    def add(self, images: Iterable[Image]) -> None:
        """Enter accepted images, before the scheduler has them: their order changes there."""
        for image in images:
            request, row_steps = image.request, image.row_steps
            self._orders[image] = image.order
            self._requests.setdefault(request.request_id, {})[image.position] = image
            self.rows += image.rows
            client = self._clients.setdefault(request.client, ClientWork())
            client.rows += image.rows
            client.images += 1
            model = self._models[request.model]
            model.rows += image.rows
            model.classified_rows += image.classified_rows
            line = model.line(request.priority)
            line.work.add(image.order, row_steps)
            line.clients[request.client] += row_steps

    def remove(self, request_id: str, position: int) -> Image:
        """Strike out an image that has ended, for whatever reason.

        Raises:
            KeyError: there is no such image.
        """
        images = self._requests[request_id]
        image = images.pop(position)
        if not images:
            del self._requests[request_id]
        request = image.request
        self.rows -= image.rows
        client = self._clients[request.client]
        client.rows -= image.rows
        client.images -= 1
        if not client.images:
            del self._clients[request.client]
        model = self._models[request.model]
        model.rows -= image.rows
        model.classified_rows -= image.classified_rows
        line = model.line(request.priority)
        line.work.remove(self._orders.pop(image))
        line.clients[request.client] -= image.row_steps
        if not line.clients[request.client]:
            del line.clients[request.client]
        return image
