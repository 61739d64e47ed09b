"""Ledger: the record of accepted work, used by limits, predictions and the removal of models."""

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
    """Row-steps of each image, sorted by its order."""
    images: dict[Order, Image] = field(default_factory=dict)
    """Each image by its order."""
    clients: Counter[str] = field(default_factory=Counter)
    """Row-steps of each client that has images in the line."""


@dataclass
class ModelWork:
    """Accepted work of one model."""

    rows: int = 0
    classified_rows: int = 0
    expected: int = 0
    """Row-steps that will come to this model, of images in an earlier stage."""
    interactive: Line = field(default_factory=Line)
    batch: Line = field(default_factory=Line)

    @property
    def row_steps(self) -> int:
        """Return the row-steps of all its images."""
        return self.interactive.work.work + self.batch.work.work

    def line(self, priority: Priority) -> Line:
        """Return the accepted work of a priority."""
        return self.batch if priority is Priority.BATCH else self.interactive


@dataclass
class ClientWork:
    """Accepted work of one client."""

    rows: int = 0
    images: int = 0


class Ledger:
    """Accepted images that have not ended, in the state they had at admission. Runs in the event loop.

    `Snapshot` has their progress since then.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self.rows = 0
        """Rows of all accepted images, each in the stage that has most."""
        self.given_bytes = 0
        """Memory of the given arrays of all requests with images in the ledger."""
        self._orders: dict[Image, Order] = {}
        self._later: dict[Image, Order] = {}
        """Orders at arrival of second stages that have not begun."""
        self._models = {model: ModelWork() for model in models}
        self._clients: dict[str, ClientWork] = {}
        self._requests: dict[str, dict[int, Image]] = {}

    @property
    def orders(self) -> Mapping[Image, Order]:
        """Return every accepted image with its order at arrival."""
        return self._orders

    @property
    def models(self) -> Mapping[str, ModelWork]:
        """Return the work of every loaded model, including retired ones."""
        return self._models

    @property
    def requests(self) -> int:
        """Return the number of requests with images in the ledger."""
        return len(self._requests)

    def client(self, name: str) -> ClientWork:
        """Return the work of a client; zero if it has none."""
        return self._clients.get(name, ClientWork())

    def unfinished(self, request_id: str) -> Collection[Image]:
        """Return the images of a request that have not ended."""
        return self._requests.get(request_id, {}).values()

    def add_model(self, model: str) -> None:
        """Add a model. Every `Snapshot` used together with this ledger must contain it."""
        self._models[model] = ModelWork()

    def remove_model(self, model: str) -> None:
        """Remove a model whose images have all ended. A `Snapshot` may still contain it for a while."""
        del self._models[model]

    def add(self, images: Iterable[Image]) -> None:
        """Record accepted images. Call this before the scheduler gets them, because it changes their order."""
        for image in images:
            if image.request_id not in self._requests:
                self.given_bytes += image.request.given_bytes
            self._requests.setdefault(image.request_id, {})[image.position] = image
            self.rows += image.held_rows
            client = self._clients.setdefault(image.client, ClientWork())
            client.images += 1
            client.rows += image.held_rows
            self._enter(image, image.order)

    def advance(self, image: Image) -> None:
        """Replace an image whose stage is done by its next stage.

        Raises:
            KeyError: the ledger has no such image.
            ValueError: it has no next stage.
        """
        if image.then is None:
            raise ValueError(f"image {image.position} of {image.request_id} has no further stage")
        order = self._later[image.then]  # the scheduler may have changed the image's own
        self._leave(image)
        self._requests[image.request_id][image.position] = image.then
        self._enter(image.then, order)

    def remove(self, request_id: str, position: int) -> Image:
        """Remove and return an image that has ended, for any reason.

        Raises:
            KeyError: the ledger has no such image.
        """
        images = self._requests[request_id]
        image = images.pop(position)
        if not images:
            del self._requests[request_id]
            self.given_bytes -= image.request.given_bytes
        self._leave(image)
        self.rows -= image.held_rows
        client = self._clients[image.client]
        client.images -= 1
        client.rows -= image.held_rows
        if not client.images:
            del self._clients[image.client]
        return image

    def _enter(self, image: Image, order: Order) -> None:
        self._orders[image] = order
        model = self._models[image.model]
        model.rows += image.rows
        model.classified_rows += image.classified_rows
        line = model.line(image.priority)
        line.work.add(order, image.row_steps)
        line.images[order] = image
        line.clients[image.client] += image.row_steps
        if image.then is not None:
            self._later[image.then] = image.then.order
            self._models[image.then.model].expected += image.then.row_steps

    def _leave(self, image: Image) -> None:
        model = self._models[image.model]
        model.rows -= image.rows
        model.classified_rows -= image.classified_rows
        line = model.line(image.priority)
        order = self._orders.pop(image)
        line.work.remove(order)
        del line.images[order]
        line.clients[image.client] -= image.row_steps
        if not line.clients[image.client]:
            del line.clients[image.client]
        if image.then is not None:
            del self._later[image.then]
            self._models[image.then.model].expected -= image.then.row_steps
