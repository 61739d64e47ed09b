"""Tickets: track accepted requests, resolve the futures of their images and feed their event streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from service.engine.activity import Activity
from service.engine.counting import ImageCounts
from service.engine.event_stream import EventStream
from service.engine.forecast import Prediction
from service.engine.request import FailureReason, GenerationRequest, ImageResult, ImageStatus, Observation
from service.errors import Aborted, EngineDead, GenerationFailed, ImageFailed, NotFinite
from service.metrics import Metrics


@dataclass
class Ticket:
    """An accepted request: one future per image, in order."""

    request: GenerationRequest
    images: list[asyncio.Future[ImageResult]]
    submitted_at: float
    """time.monotonic() at admission."""
    prediction: Prediction
    """Prediction made at admission; `AsyncEngine.eta` returns a newer one."""
    events: EventStream | None
    """Event stream for one reader; None if the request has no `watch`."""
    ended: asyncio.Future[None]
    """Done when every image has left the engine; later than `images` if these were abandoned."""
    outcomes: list[ImageResult] = field(init=False, default_factory=list)
    """Results of all images that left the engine, including failed and aborted ones."""

    def resolve(self, position: int, outcome: ImageResult | GenerationFailed) -> None:
        """Set an image's future and add the event to the stream, unless already done."""
        future = self.images[position]
        if future.done():
            return
        if self.events is not None:
            self.events.image_ended(position, outcome)
        if isinstance(outcome, ImageResult):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
            future.exception()  # mark as retrieved: the client may have disconnected


class Tickets:
    """The tickets of requests that have not ended. Runs in the event loop."""

    def __init__(self, metrics: Metrics, activity: Activity) -> None:
        self._metrics = metrics
        self._counts = ImageCounts(metrics, activity)
        self._tickets: dict[str, Ticket] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tickets

    def open(
        self,
        request: GenerationRequest,
        submitted_at: float,
        prediction: Prediction,
        predict: Callable[[], Prediction | None],
    ) -> Ticket:
        """Create and return the ticket of an accepted request.

        Args:
            request: the accepted request.
            submitted_at: time.monotonic() at admission.
            prediction: the prediction made at admission.
            predict: returns a newer prediction, or None once all images have ended.
        """
        loop = asyncio.get_running_loop()
        count = len(request.images)
        ticket = Ticket(
            request=request,
            images=[loop.create_future() for _ in range(count)],
            submitted_at=submitted_at,
            prediction=prediction,
            events=None if request.watch is None else EventStream(count, prediction, predict),
            ended=loop.create_future(),
        )
        self._tickets[request.request_id] = ticket
        self._empty.clear()
        self._metrics.predicted_wait_seconds.observe(prediction.wait_s)
        return ticket

    def observe(self, observations: Iterable[Observation]) -> None:
        """Forward observations of unfinished images to their event streams."""
        for seen in observations:
            ticket = self._tickets.get(seen.request_id)
            if ticket is not None and ticket.events is not None and not ticket.images[seen.position].done():
                ticket.events.observe(seen)

    def image_ended(self, result: ImageResult) -> None:
        """Count an image that has left the engine and resolve its future. The last image ends its request.

        Raises:
            KeyError: the request has ended or was never accepted.
        """
        ticket = self._tickets[result.request_id]
        ticket.outcomes.append(result)
        if result.status is ImageStatus.DONE:
            self._counts.done(ticket.request.name, result)
            ticket.resolve(result.position, result)
        elif result.failure is not None:
            self._counts.failed(ticket.request.name)
            image_index = ticket.request.images[result.position].image_index
            ticket.resolve(result.position, image_failure(image_index, result.failure))
        else:
            ticket.resolve(result.position, Aborted("the request was cancelled"))
        if len(ticket.outcomes) == len(ticket.images):
            self._end(ticket)

    def close_events(self, request_id: str) -> None:
        """Close a request's event stream because the request is being aborted."""
        events = self._tickets[request_id].events
        if events is not None:
            events.close()

    def fail_all(self, message: str) -> None:
        """End all requests with `EngineDead`."""
        for ticket in self._tickets.values():
            for position in range(len(ticket.images)):
                ticket.resolve(position, EngineDead(message))
            ticket.ended.set_result(None)
        self._tickets.clear()
        self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until every accepted request has ended."""
        await self._empty.wait()

    def _end(self, ticket: Ticket) -> None:
        """Remove a request; if all its images completed, record the accuracy of its prediction."""
        ticket.ended.set_result(None)
        del self._tickets[ticket.request.request_id]
        if not self._tickets:
            self._empty.set()
        complete = all(future.done() and not future.cancelled() and not future.exception() for future in ticket.images)
        if complete and ticket.prediction.finish_s > 0:
            took = time.monotonic() - ticket.submitted_at
            self._metrics.finish_over_predicted.observe(took / ticket.prediction.finish_s)


def image_failure(image_index: int, reason: FailureReason) -> GenerationFailed:
    """Return the error for a failed image."""
    if reason == "not_finite":
        return NotFinite(f"image {image_index}: its numbers overflowed while sampling")
    if reason == "out_of_memory":
        return ImageFailed(f"image {image_index}: it does not fit in the available memory, even alone")
    return ImageFailed(f"image {image_index}: the network failed on it, even alone; see the log for details")
