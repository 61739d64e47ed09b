"""The scheduler: which images take the next step. It decides and keeps ids; it knows no tensors and no HTTP."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from service.engine.config import EngineConfig
from service.engine.plan_table import PlanTable
from service.engine.request import Image, ImageStatus, Start, StepBatch


class _Lane:
    """The images of one model, and the slots and plan lines they hold."""

    def __init__(self, config: EngineConfig) -> None:
        self.waiting: deque[Image] = deque()
        self.running: list[Image] = []  # by arrival
        self.free_slots = list(range(config.num_slots))
        self.plans = PlanTable(config.plan_lines)


class Scheduler:
    """First come, first served, a step at a time.

    Images are served in the order of their arrival; each step takes as many rows as the width allows. An image
    with two rows that finds only one left is passed over for that step, and comes before later ones as soon as
    two are free: nobody is overtaken for longer than it takes those before it to finish. Pre-emption is not being
    picked: the image keeps its slot, and nothing is computed again. Models take turns, step by step.
    """

    def __init__(self, config: EngineConfig, models: Iterable[str]) -> None:
        self._config = config
        self._lanes = {model: _Lane(config) for model in models}
        self._turn = deque(self._lanes)
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Images that have not started."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    @property
    def num_running(self) -> int:
        """Images that hold a slot."""
        return sum(len(lane.running) for lane in self._lanes.values())

    def has_work(self) -> bool:
        """Say whether any image is in flight."""
        return any(lane.waiting or lane.running for lane in self._lanes.values())

    def in_flight(self) -> list[Image]:
        """Return every image in flight, by model and arrival."""
        return [image for lane in self._lanes.values() for image in (*lane.running, *lane.waiting)]

    def add(self, images: Iterable[Image]) -> None:
        """Let images wait for their first step."""
        for image in images:
            image.sequence = self._arrivals
            self._arrivals += 1
            self._lanes[image.model].waiting.append(image)

    def abort(self, request_id: str) -> list[Image]:
        """Take a request's images out, whatever they were doing; their rows are free at the next step."""
        aborted = [image for image in self.in_flight() if image.request_id == request_id]
        for image in aborted:
            lane = self._lanes[image.model]
            if image.status is ImageStatus.WAITING:
                lane.waiting.remove(image)
                image.status = ImageStatus.ABORTED
            else:
                self._leave(lane, image, ImageStatus.ABORTED)
        return aborted

    def schedule(self, now: float) -> StepBatch | None:
        """Pick the next step batch, starting images that it is the first step of; None when nothing is in flight.

        Args:
            now: time.monotonic(), noted on images that start.
        """
        for _ in range(len(self._turn)):
            model = self._turn[0]
            self._turn.rotate(-1)
            lane = self._lanes[model]
            if lane.waiting or lane.running:
                return self._fill(model, lane, now)
        return None

    def complete(self, batch: StepBatch, ok: list[bool]) -> list[Image]:
        """Write a step back: count it, and take out the images that finished or are not finite any more.

        Returns:
            The images that left, in the batch's order; their `slot` is what they held, free from now on.
        """
        lane = self._lanes[batch.model]
        left = []
        for image, fine in zip(batch.images, ok, strict=True):
            image.steps_done += 1
            if not fine:
                self._leave(lane, image, ImageStatus.FAILED)
                left.append(image)
            elif image.steps_done == image.params.num_steps:
                self._leave(lane, image, ImageStatus.DONE)
                left.append(image)
        return left

    def _fill(self, model: str, lane: _Lane, now: float) -> StepBatch:
        rows_left = self._config.max_rows
        images: list[Image] = []
        starts: list[Start] = []
        started: list[Image] = []
        may_start = True
        for image in heapq.merge(lane.running, lane.waiting, key=_arrival):
            if rows_left == 0:
                break
            if image.params.rows > rows_left:
                continue
            if image.status is ImageStatus.WAITING:
                start = self._start(lane, image, now) if may_start else None
                if start is None:
                    may_start = False  # no slot or no plan lines: later arrivals must not overtake it
                    continue
                starts.append(start)
                started.append(image)
            images.append(image)
            rows_left -= image.params.rows
        for image in started:
            lane.waiting.remove(image)  # it is near the front
        if started:
            lane.running = sorted([*lane.running, *started], key=_arrival)
        return StepBatch(model=model, images=tuple(images), starts=tuple(starts))

    def _start(self, lane: _Lane, image: Image, now: float) -> Start | None:
        if not lane.free_slots:
            return None
        found = lane.plans.acquire(image.params.plan, image.params.num_steps)
        if found is None:
            return None
        image.status = ImageStatus.RUNNING
        image.slot = lane.free_slots.pop()
        image.plan_offset = found.offset
        image.started_at = now
        return Start(slot=image.slot, params=image.params, plan_offset=found.offset, write_plan=found.fresh)

    @staticmethod
    def _leave(lane: _Lane, image: Image, status: ImageStatus) -> None:
        if image.slot is None:
            raise RuntimeError(f"image {image.position} of {image.request_id} left without having a slot")
        lane.running.remove(image)
        lane.free_slots.append(image.slot)
        lane.plans.release(image.params.plan)
        image.status = status


def _arrival(image: Image) -> int:
    return image.sequence
