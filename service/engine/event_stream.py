"""EventStream: what happens to an accepted request, for one reader, however slow he is."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from service.engine.events import Completed, Event, ImageDone, ImageFailed, Queued
from service.engine.forecast import Prediction
from service.engine.request import ImagePreview, ImageProgress, ImageResult, Observation
from service.errors import GenerationFailed

ROUND_EVERY_S = 0.05
"""Least time between two rounds of progress and previews: more than people can see would only slow the engine down."""
QUEUED_EVERY_S = 1.0
ETA_EVERY_S = 1.0
"""A prediction serves so long, counting down."""
ETA_SHARE = 0.01
"""Or longer: making predictions takes at most this part of the time. One for 64 images costs 14 ms or more."""


class EventStream:
    """An asynchronous iterator over a request's events. Belongs to the event loop.

    Progress and previews that have not been read are replaced by newer ones, and forgotten once their image has ended:
    a slow reader misses some, costs no memory and delays nobody. All other events come exactly once.
    """

    def __init__(
        self,
        images: int,
        prediction: Prediction,
        predict: Callable[[], Prediction | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with `Queued`.

        Args:
            images: how many there are in the request.
            prediction: made on admission.
            predict: makes a newer one; None once all images have ended.
            clock: in seconds; never goes back.
        """
        self._predict = predict
        self._clock = clock
        self._unfinished = images
        self._all_done = True
        self._in_queue = True
        self._closed = False
        self._news: deque[Event] = deque()  # at most one per image, and two more
        self._steps: dict[tuple[type[Observation], int], Observation] = {}  # the newest of each kind of each image
        self._round: deque[tuple[type[Observation], int]] = deque()
        self._round_at = 0.0
        self._eta_at = 0.0
        self._finish_at = 0.0
        self._queued_every_s = QUEUED_EVERY_S
        self._changed = asyncio.Event()
        self._put_queued(prediction)

    def __aiter__(self) -> EventStream:
        """Return the stream: it has one reader."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event, waiting for one. May be cancelled: no event is lost by it."""
        while True:
            if self._news:
                return self._news.popleft()
            if (step := self._newest_step()) is not None:
                return step
            if self._closed:
                raise StopAsyncIteration
            await self._wait()

    def observe(self, seen: Observation) -> None:
        """Take in what a step showed of an image that goes on."""
        if self._closed:
            return
        self._in_queue = False
        if not self._steps:
            self._changed.set()
        self._steps[type(seen), seen.position] = seen

    def image_ended(self, position: int, outcome: ImageResult | GenerationFailed) -> None:
        """Take in the end of an image; the last one ends the stream."""
        if self._closed:
            return
        self._in_queue = False
        for kind in (ImageProgress, ImagePreview):
            self._steps.pop((kind, position), None)
        self._unfinished -= 1
        if isinstance(outcome, ImageResult):
            eta_s = self._eta_s() if self._unfinished else 0.0
            self._news.append(ImageDone(position=position, eta_s=eta_s, result=outcome))
        else:
            self._all_done = False
            self._news.append(ImageFailed(position=position, error=outcome))
        if not self._unfinished:
            if self._all_done:
                self._news.append(Completed())
            self._closed = True
        self._changed.set()

    def close(self) -> None:
        """End the stream here: nobody wants what has not been read."""
        self._closed = True
        self._news.clear()
        self._steps.clear()
        self._changed.set()

    async def _wait(self) -> None:
        """Wait for a change, or until it is time to say something without one."""
        self._changed.clear()
        seconds = None
        if self._steps:
            seconds = self._round_at - self._clock()
        elif self._in_queue:
            seconds = self._queued_every_s
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
                return
        if self._in_queue:
            begun = self._clock()
            prediction = self._predict()
            self._queued_every_s = max(QUEUED_EVERY_S, (self._clock() - begun) / ETA_SHARE)
            if prediction is not None:
                self._put_queued(prediction)

    def _newest_step(self) -> Observation | None:
        """Return what is left of a round of progress and previews, or begin a round if it is time for one."""
        if self._steps and not self._round and self._clock() >= self._round_at:
            self._round.extend(self._steps)
            self._round_at = self._clock() + ROUND_EVERY_S
        while self._round:
            seen = self._steps.pop(self._round.popleft(), None)
            if seen is not None:
                return replace(seen, eta_s=self._eta_s())
        return None

    def _eta_s(self) -> float:
        now = self._clock()
        if now >= self._eta_at and (prediction := self._predict()) is not None:
            self._eta_at = now + max(ETA_EVERY_S, (self._clock() - now) / ETA_SHARE)
            self._finish_at = now + prediction.finish_s
        return max(0.0, self._finish_at - now)

    def _put_queued(self, prediction: Prediction) -> None:
        self._news.append(Queued(images_ahead=prediction.position, wait_s=prediction.wait_s, eta_s=prediction.finish_s))
