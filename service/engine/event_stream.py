"""EventStream: the events of an accepted request, for one reader of any speed."""

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
"""Minimum interval between two rounds of progress and previews. Faster updates would only slow the engine down."""
QUEUED_EVERY_S = 1.0
ETA_EVERY_S = 1.0
"""Minimum seconds for which a prediction is reused, counting down."""
ETA_SHARE = 0.01
"""Maximum share of time spent on predictions; may lengthen the interval. One for 64 images costs 14 ms or more."""


class EventStream:
    """An asynchronous iterator over a request's events. Runs in the event loop.

    Newer progress and previews replace unread ones, and are discarded once their image has ended. A slow reader
    therefore misses some of them, but uses no additional memory and delays no other request. All other events are
    delivered exactly once.
    """

    def __init__(
        self,
        images: int,
        prediction: Prediction,
        predict: Callable[[], Prediction | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the stream with a `Queued` event.

        Args:
            images: number of images in the request.
            prediction: the prediction made at admission.
            predict: returns a newer prediction, or None once all images have ended.
            clock: monotonic clock, in seconds.
        """
        self._predict = predict
        self._clock = clock
        self._unfinished = images
        self._all_done = True
        self._in_queue = True
        self._closed = False
        self._news: deque[Event] = deque()  # at most one per image, plus two
        self._steps: dict[tuple[type[Observation], int], Observation] = {}  # the newest per kind and image
        self._round: deque[tuple[type[Observation], int]] = deque()
        self._round_at = 0.0
        self._eta_at = 0.0
        self._finish_at = 0.0
        self._queued_every_s = QUEUED_EVERY_S
        self._changed = asyncio.Event()
        self._put_queued(prediction)

    @property
    def unread(self) -> int:
        """Return the number of events that wait for the reader: at most 3 per image, plus two."""
        return len(self._news) + len(self._steps)

    def __aiter__(self) -> EventStream:
        """Return the stream itself: it supports one reader."""
        return self

    async def __anext__(self) -> Event:
        """Wait for the next event and return it. Cancellation loses no event."""
        while True:
            if self._news:
                return self._news.popleft()
            if (step := self._newest_step()) is not None:
                return step
            if self._closed:
                raise StopAsyncIteration
            await self._wait()

    def observe(self, seen: Observation) -> None:
        """Record the progress or preview of an unfinished image."""
        if self._closed:
            return
        self._in_queue = False
        if not self._steps:
            self._changed.set()
        self._steps[type(seen), seen.position] = seen

    def image_ended(self, position: int, outcome: ImageResult | GenerationFailed) -> None:
        """Record the end of an image. The last one ends the stream."""
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
        """End the stream and discard unread events."""
        self._closed = True
        self._news.clear()
        self._steps.clear()
        self._changed.set()

    async def _wait(self) -> None:
        """Wait for a change, or until a periodic event is due."""
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
        """Return the next item of the current round of progress and previews; start a new round if one is due."""
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
