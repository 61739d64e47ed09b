"""Admission: which requests are accepted. It enforces the limits and enters accepted images in the ledger."""

from __future__ import annotations

from collections.abc import Iterable

from service.engine.config import EngineConfig
from service.engine.forecast import Forecast, Prediction
from service.engine.ledger import Ledger
from service.engine.model_ids import name_of
from service.engine.order import ServiceOrder
from service.engine.request import GenerationRequest, Image, Priority
from service.engine.snapshot import Snapshot
from service.errors import ClientLimit, DeadlineUnmeetable, InvalidRequest, QueueFull, UnknownModel


class Admission:
    """Owns the ledger, the forecast that reads it, and which models accept requests. Belongs to the event loop."""

    def __init__(self, config: EngineConfig, models: Iterable[str]) -> None:
        self.ledger = Ledger(models)
        """Changed by this alone."""
        self._config = config
        self._order = ServiceOrder(config)
        self._forecast = Forecast(config, self.ledger)
        self._accepting = set(self.ledger.models)
        """Models that requests may be for; others in the ledger finish their last images."""

    def accept(
        self, request: GenerationRequest, submitted_at: float, snapshot: Snapshot
    ) -> tuple[list[Image], Prediction]:
        """Accept a request, or refuse it before any work is done.

        Args:
            request: what is asked for.
            submitted_at: time.monotonic(), from which its deadline counts.
            snapshot: of the engine as it is now.

        Returns:
            Its images, which are in the ledger and in no scheduler yet, and what to expect of them.

        Raises:
            InvalidRequest: more images than could ever be in flight.
            QueueFull: too many rows are in flight, or the predicted wait is too long.
            ClientLimit: too many of them are this client's.
            DeadlineUnmeetable: it would not be done in time.
            UnknownModel: no such model, or not any more.
        """
        if request.model not in self._accepting:
            raise UnknownModel(name_of(request.model), sorted({name_of(model) for model in self._accepting}))
        self._check_client_images(request, snapshot)
        self._check_rows(request, snapshot)
        images = self._order.images_of(request, submitted_at, snapshot.steps[request.model])
        prediction = self._forecast.predict(images, snapshot)
        self._check_prediction(request, prediction)
        self.ledger.add(images)
        return images, prediction

    def release(self, request_id: str, position: int) -> None:
        """Take note that an image has ended, for whatever reason.

        Raises:
            KeyError: there is no such image.
        """
        self.ledger.remove(request_id, position)

    def release_all(self) -> None:
        """Take note that no image will be finished any more."""
        for image in [*self.ledger.orders]:
            self.ledger.remove(image.request_id, image.position)

    def eta(self, request_id: str, snapshot: Snapshot) -> Prediction | None:
        """Predict when an accepted request will be done; None: all its images have ended."""
        return self._forecast.eta(request_id, snapshot)

    def add_model(self, model: str) -> None:
        """Accept requests for a model that the engine has taken in."""
        self.ledger.add_model(model)
        self._accepting.add(model)

    def retire_model(self, model: str) -> None:
        """Accept no more requests for a model."""
        self._accepting.remove(model)

    def remove_finished_models(self) -> list[str]:
        """Forget the retired models whose images have all ended; returns them."""
        models = self.ledger.models
        finished = [model for model in models if model not in self._accepting and not models[model].rows]
        for model in finished:
            self.ledger.remove_model(model)
        return finished

    def _check_client_images(self, request: GenerationRequest, snapshot: Snapshot) -> None:
        """Refuse by the limit that a client brings along."""
        limit, count = request.max_client_images, len(request.images)
        if limit is None:
            return
        if count > limit:
            raise InvalidRequest(
                "n", f"must be at most {limit}, the images this client may have in flight; got {count}"
            )
        in_flight = self.ledger.client(request.client).images
        if in_flight + count > limit:
            raise ClientLimit(
                f"{in_flight} images of this client are in flight, at most {limit} can be; this request has {count}",
                self._until_free_s((in_flight + count - limit) * request.rows // count, snapshot),
            )

    def _check_rows(self, request: GenerationRequest, snapshot: Snapshot) -> None:
        """Refuse by rows: what is in flight in all, and of this client."""
        rows, limit, in_flight = request.rows, self._config.max_in_flight, self.ledger.rows
        if rows > limit:
            count = limit * len(request.images) // rows
            raise InvalidRequest(
                "n", f"must be at most {count}, the images this service can hold; got {len(request.images)}"
            )
        if in_flight + rows > limit:
            raise QueueFull(
                f"{in_flight} rows are in flight, at most {limit} can be; this request has {rows}",
                self._until_free_s(in_flight + rows - limit, snapshot),
            )
        own, part = self.ledger.client(request.client).rows, int(limit * self._config.client_share)
        if request.client and own and own + rows > part:  # a client that has nothing in flight is never refused here
            raise ClientLimit(
                f"{own} rows of this client are in flight, at most {part} can be; this request has {rows}",
                self._until_free_s(own + rows - part, snapshot),
            )

    def _check_prediction(self, request: GenerationRequest, prediction: Prediction) -> None:
        """Refuse by predicted time: waits that are too long, and deadlines that cannot be met."""
        too_long = prediction.wait_s - self._config.max_wait_s
        if too_long > 0 and request.priority is Priority.INTERACTIVE:
            raise QueueFull(
                f"the predicted wait is {prediction.wait_s:.3g} s, at most {self._config.max_wait_s:.3g} s can be",
                max(1.0, too_long),
            )
        if request.deadline_s is not None and prediction.finish_s > request.deadline_s:
            raise DeadlineUnmeetable(request.deadline_s, prediction.finish_s)

    def _until_free_s(self, rows: int, snapshot: Snapshot) -> float:
        """Predict when so many rows in flight will have left, as if all took equally long; at least 1 s."""
        return max(1.0, self._forecast.backlog_s(snapshot) * rows / max(rows, self.ledger.rows))
