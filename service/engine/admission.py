"""Admission: accept or reject requests, enforce the limits, and record accepted images in the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from service.engine.config import EngineConfig
from service.engine.forecast import Forecast, Prediction
from service.engine.ledger import Ledger
from service.engine.model_ids import name_of
from service.engine.order import ServiceOrder
from service.engine.request import GenerationRequest, Image, Priority
from service.engine.snapshot import Snapshot
from service.errors import ClientLimit, DeadlineUnmeetable, InvalidRequest, QueueFull, TooLong, UnknownModel


class Admission:
    """Owns the ledger, its forecast and the set of models that accept requests. Runs in the event loop."""

    def __init__(self, config: EngineConfig, models: Iterable[str]) -> None:
        self.ledger = Ledger(models)
        """Modified only by this class."""
        self._config = config
        self._order = ServiceOrder(config)
        self._forecast = Forecast(config, self.ledger)
        self._accepting = set(self.ledger.models)
        """Models that accept requests. Other models in the ledger are finishing their last images."""

    def accept(
        self, request: GenerationRequest, submitted_at: float, snapshot: Snapshot
    ) -> tuple[list[Image], Prediction]:
        """Accept a request, or reject it before any work is done.

        Args:
            request: the request to check.
            submitted_at: time.monotonic() at submission; the deadline counts from it.
            snapshot: the current state of the engine.

        Returns:
            The request's images, recorded in the ledger but not yet scheduled, and their prediction.

        Raises:
            InvalidRequest: the request has more images than can ever be in flight.
            QueueFull: too many rows or given arrays are in flight, or the predicted wait is too long.
            ClientLimit: this client has too much work in flight.
            DeadlineUnmeetable: the request is predicted to miss its deadline.
            TooLong: it would be given up before its end, however short the queue.
            UnknownModel: the model does not exist or was retired.
        """
        for model in request.models:
            if model not in self._accepting:
                raise UnknownModel(name_of(model), sorted({name_of(model) for model in self._accepting}))
        self._check_client_images(request, snapshot)
        self._check_rows(request, snapshot)
        self._check_given(request, snapshot)
        images = self._order.images_of(request, submitted_at, snapshot.steps)
        prediction = self._forecast.predict(images, snapshot)
        self._check_prediction(request, prediction)
        self._check_duration(request, images, prediction, snapshot)
        self.ledger.add(images)
        return images, prediction

    def release(self, request_id: str, position: int) -> None:
        """Remove an image that has ended, for any reason, from the ledger.

        Raises:
            KeyError: the ledger has no such image.
        """
        self.ledger.remove(request_id, position)

    def advance(self, image: Image) -> None:
        """Replace an image in the ledger by its next stage, which the engine has begun.

        Raises:
            KeyError: the ledger has no such image.
        """
        self.ledger.advance(image)

    def release_all(self) -> None:
        """Remove all images from the ledger: none of them will complete."""
        for image in [*self.ledger.orders]:
            self.ledger.remove(image.request_id, image.position)

    def eta(self, request_id: str, snapshot: Snapshot) -> Prediction | None:
        """Predict when an accepted request will finish; None if all its images have ended."""
        return self._forecast.eta(request_id, snapshot)

    def add_model(self, model: str) -> None:
        """Accept requests for a model that the engine has loaded."""
        self.ledger.add_model(model)
        self._accepting.add(model)

    def retire_model(self, model: str) -> None:
        """Stop accepting requests for a model."""
        self._accepting.remove(model)

    def remove_finished_models(self) -> list[str]:
        """Remove the retired models whose images have all ended, and return them."""
        models = self.ledger.models
        busy = {model for model, work in models.items() if work.rows or work.expected}
        finished = [model for model in models if model not in self._accepting and model not in busy]
        for model in finished:
            self.ledger.remove_model(model)
        return finished

    def _check_client_images(self, request: GenerationRequest, snapshot: Snapshot) -> None:
        """Enforce the client's own limit on images in flight."""
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
                f"{in_flight} images of this client are in flight, the limit is {limit}; this request has {count}",
                self._until_free_s((in_flight + count - limit) * request.rows // count, snapshot),
            )

    def _check_rows(self, request: GenerationRequest, snapshot: Snapshot) -> None:
        """Enforce the limits on rows in flight, in total and per client."""
        rows, limit, in_flight = request.rows, self._config.max_in_flight, self.ledger.rows
        if rows > limit:
            count = limit * len(request.images) // rows
            raise InvalidRequest(
                "n", f"must be at most {count}, the images this service can hold; got {len(request.images)}"
            )
        if in_flight + rows > limit:
            raise QueueFull(
                f"{in_flight} rows are in flight, the limit is {limit}; this request has {rows}",
                self._until_free_s(in_flight + rows - limit, snapshot),
            )
        own, part = self.ledger.client(request.client).rows, int(limit * self._config.client_share)
        if request.client and own and own + rows > part:  # never reject a client with nothing in flight
            raise ClientLimit(
                f"{own} rows of this client are in flight, the limit is {part}; this request has {rows}",
                self._until_free_s(own + rows - part, snapshot),
            )

    def _check_given(self, request: GenerationRequest, snapshot: Snapshot) -> None:
        """Enforce the limit on the memory of given arrays."""
        size, limit, in_flight = request.given_bytes, self._config.max_given_bytes, self.ledger.given_bytes
        if size > limit:
            raise InvalidRequest(
                "n",
                f"given images, and those between the stages of a cascade, must take at most {limit} bytes of memory; "
                f"these take {size}",
            )
        if size and in_flight + size > limit:
            raise QueueFull(
                f"given images take {in_flight} bytes of memory, the limit is {limit}; this request has {size}",
                self._until_free_s(request.rows, snapshot),
            )

    def _check_prediction(self, request: GenerationRequest, prediction: Prediction) -> None:
        """Reject requests whose predicted wait is too long or whose deadline cannot be met."""
        too_long = prediction.wait_s - self._config.max_wait_s
        if too_long > 0 and request.priority is Priority.INTERACTIVE:
            raise QueueFull(
                f"the predicted wait is {prediction.wait_s:.3g} s, the limit is {self._config.max_wait_s:.3g} s",
                max(1.0, too_long),
            )
        if request.deadline_s is not None and prediction.finish_s > request.deadline_s:
            raise DeadlineUnmeetable(request.deadline_s, prediction.finish_s)

    def _check_duration(
        self, request: GenerationRequest, images: Sequence[Image], prediction: Prediction, snapshot: Snapshot
    ) -> None:
        """Reject requests that would be given up before their end; a retry helps those that only other work delays."""
        limit = request.longest_s
        if limit is None or prediction.finish_s <= limit:
            return
        alone = Forecast(self._config, Ledger(self.ledger.models)).predict(images, snapshot)
        if alone.finish_s > limit:
            raise TooLong(limit, alone.finish_s)
        raise QueueFull(
            f"predicted to finish in {prediction.finish_s:.3g} s, the limit is {limit:.3g} s",
            max(1.0, prediction.finish_s - limit),
        )

    def _until_free_s(self, rows: int, snapshot: Snapshot) -> float:
        """Predict the seconds until `rows` rows in flight finish, assuming equal durations; at least 1 s."""
        return max(1.0, self._forecast.backlog_s(snapshot) * rows / max(rows, self.ledger.rows))
