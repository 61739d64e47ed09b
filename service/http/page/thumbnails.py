"""Thumbnails: a small picture of each class, for the page's gallery.

The engine makes them, so every model has some. A thumbnail is made when it is first requested, at batch priority, so
that no client waits for it, and then kept in memory.
"""

from __future__ import annotations

import asyncio
import uuid

from formats.images import encode, shrink
from service.engine.async_engine import AsyncEngine
from service.engine.request import ImageResult
from service.http.encoding_pool import EncodingPool
from service.models.served_model import ServedModel
from service.requests.completion import complete
from service.requests.generate_request import GenerateRequest

LONGEST_SIDE = 64
"""Longest side in pixels; larger images are shrunk. The thumbnails of 1,000 classes take about 10 MB."""
STEPS = 50
SEED = 0
CLIENT = "thumbnails"
"""Client name of thumbnails, for fairness between clients."""
AT_ONCE = 4
"""Maximum number of thumbnails in the engine, so that a page of all classes does not fill the queue."""
_Key = tuple[str, str, int]
"""Name and numerics_id of a model, and the class."""


class Thumbnails:
    """Owns the thumbnails and the tasks that make them. Use it only from the event loop."""

    def __init__(self, engine: AsyncEngine, encoding: EncodingPool) -> None:
        self._engine = engine
        self._encoding = encoding
        self._tasks: dict[_Key, asyncio.Task[bytes]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def get(self, model: ServedModel, class_index: int) -> bytes:
        """Return a class's thumbnail as PNG. The first call makes it; calls that wait share the work.

        Raises:
            ServiceError: the thumbnail could not be made; the next call tries again.
        """
        key = (model.name, model.numerics_id, class_index)
        if key not in self._tasks:
            # Drop thumbnails of replaced weights, so that memory does not grow with every reload
            self._tasks = {k: t for k, t in self._tasks.items() if k[0] != model.name or k[1] == model.numerics_id}
            self._tasks[key] = asyncio.create_task(self._make(model, class_index))
            self._tasks[key].add_done_callback(lambda task: self._forget_failure(key, task))
        return await asyncio.shield(self._tasks[key])  # a caller that is cancelled does not cancel the others

    async def _make(self, model: ServedModel, class_index: int) -> bytes:
        model = model if model.stages is None else model.stages[0]  # a small picture needs no upsampler
        steps = min(STEPS, model.config.diffusion.num_timesteps)
        body = {"class": class_index, "steps": steps, "seed": SEED, "priority": "batch"}
        if model.config.model.num_classes is None:  # only its classifier has classes
            body["classifier_scale"] = 1
        thumbnail = GenerateRequest.model_validate(body)
        request = complete(thumbnail, model, uuid.uuid4().hex, max_row_steps=2 * steps, client=CLIENT)
        async with self._turns:
            [image] = self._engine.submit(request).images
            result = await image
        return await self._encoding.run(_picture, result)

    def _forget_failure(self, key: _Key, task: asyncio.Task[bytes]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._tasks.pop(key, None)


def _picture(result: ImageResult) -> bytes:
    if result.pixels is None:
        raise ValueError(f"thumbnail {result.request_id} has no pixels")
    return encode(shrink(result.pixels, LONGEST_SIDE))
