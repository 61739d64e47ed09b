"""Scheduler: choose the images that take the next step and assign their slots. No tensors, no HTTP."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from service.engine.client_shares import ClientShares
from service.engine.config import EngineConfig
from service.engine.order import ServiceOrder
from service.engine.request import Image, ImageStatus, ImageStep, Move, NetworkOf, Priority, StepBatch
from service.engine.waiting_line import WaitingLine

TRIAL_INTERVAL = 32
TRIAL_STEPS = 2
"""The last `TRIAL_STEPS` of every `TRIAL_INTERVAL` steps may exceed the width, so that wider steps are measured.
The first of them may be less warmed up than those that follow."""


class _Queue:
    """The images of one model and priority."""

    def __init__(self, client_allowance: float) -> None:
        self.shares = ClientShares(client_allowance)
        self.line = WaitingLine(self.shares.ahead)
        """Images without a slot, including evicted ones."""
        self.evicted: set[Image] = set()
        self.running: list[Image] = []

    def __len__(self) -> int:
        return len(self.line) + len(self.running)

    @property
    def urgency(self) -> Callable[[Image], Any]:
        """Return the sort key of the queue, least first; valid until the next step is complete."""
        ahead = self.shares.ahead
        return (lambda image: (image.request.client in ahead, image.order)) if ahead else _ORDER

    def candidates(self, rows: int) -> list[Image]:
        """Return the running images, and images of each width from the line for `rows` rows, by urgency."""
        images = [*self.running, *self.line.front(rows)]
        images.sort(key=self.urgency)
        return images

    def served(self, rows: Mapping[str, int]) -> None:
        """Record a step's rows by client, before finished images leave."""
        for client in self.shares.serve(rows):
            self.line.moved(client)


class _Lane:
    """The images of one model, and the slots they hold."""

    def __init__(self, config: EngineConfig, network_of: NetworkOf | None) -> None:
        self.network_of = network_of
        self.interactive = _Queue(config.client_allowance)
        self.batch = _Queue(config.client_allowance)
        self.width = config.max_rows
        self.trial_widths: Sequence[int] = ()
        self.free_slots = list(range(config.num_slots))
        self.steps = 0
        self.batch_credit = 0.0
        """Row-steps that batch work may claim before interactive work; accumulated for images of two rows."""
        self.last: set[Image] = set()
        """The images picked last."""
        self.groups: deque[list[Image]] = deque()
        """Those of them whose step is still to come: one group per network."""

    def __len__(self) -> int:
        return len(self.interactive) + len(self.batch)

    def most_rows(self) -> int:
        """Return the maximum rows of the next step: the width, or a trial width."""
        trial, step = divmod(self.steps, TRIAL_INTERVAL)
        if self.trial_widths and step >= TRIAL_INTERVAL - TRIAL_STEPS:
            return self.trial_widths[trial % len(self.trial_widths)]
        return self.width

    def queue(self, image: Image) -> _Queue:
        return self.batch if image.request.priority is Priority.BATCH else self.interactive


class Scheduler:
    """Picks the most urgent images for each step.

    Order of service:

    1. Models take turns, step by step.
    2. Batch work claims `batch_share` of the row-steps. Interactive work gets the rest, and batch work also gets the
       rows that interactive work leaves. Over any number of steps that it could fill, batch work gets at least
       `batch_share * width` rows per step, minus one step's share and 2 rows in total.
    3. Within a priority, clients that received much more than an equal share yield to others
       (`service.engine.client_shares`). Otherwise the policy determines the order and the limits on overtaking
       (`service.engine.policies`).
    4. Images of a model of several networks are picked as for any other model. Those of one network then take a step
       together, one network after the other, before images are picked again.
    5. An image with two rows is skipped for a step if only one row is left, and precedes later images as soon as two
       are free.

    A pre-empted image is not picked for a step: it keeps its slot, and nothing is recomputed. If an image that starts
    finds no free slot, the least urgent image outside the step is evicted: its state moves to host memory and is
    restored, possibly to another slot, when the image is picked again.
    """

    def __init__(
        self, config: EngineConfig, models: Iterable[str], networks: Mapping[str, NetworkOf | None] | None = None
    ) -> None:
        """Create a scheduler without work.

        Args:
            config: configuration of the engine.
            models: ids of the models.
            networks: for models of several networks, the network of an image's step.
        """
        self._config = config
        self.order = ServiceOrder(config)
        """Updates images' order after each step; also sets the arrival of images that bypass admission."""
        self._lanes = {model: _Lane(config, (networks or {}).get(model)) for model in models}
        self._turn = deque(self._lanes)
        self._by_request: defaultdict[str, set[Image]] = defaultdict(set)
        self.remaining_row_steps = 0
        """Remaining work of all images in flight, with their next stages."""

    @property
    def num_waiting(self) -> int:
        """Return the number of images that have not started."""
        return sum([len(queue.line) - len(queue.evicted) for queue in self._queues()])

    @property
    def num_evicted(self) -> int:
        """Return the number of started images whose state is in host memory."""
        return sum([len(queue.evicted) for queue in self._queues()])

    @property
    def num_running(self) -> int:
        """Return the number of images that hold a slot."""
        return sum([len(queue.running) for queue in self._queues()])

    def has_work(self) -> bool:
        """Return whether any image is in flight."""
        return bool(self._by_request)

    def in_flight(self) -> list[Image]:
        """Return every image in flight, those that hold a slot first."""
        return self.running() + [image for queue in self._queues() for image in sorted(queue.line, key=_ORDER)]

    def running(self) -> list[Image]:
        """Return the images that hold a slot."""
        return [image for queue in self._queues() for image in queue.running]

    def started(self) -> list[Image]:
        """Return the images that have started, with or without a slot."""
        return [image for queue in self._queues() for image in (*queue.running, *queue.evicted)]

    def free_slots(self, model: str) -> list[int]:
        """Return the slots of a model that no image holds, in ascending order."""
        return sorted(self._lanes[model].free_slots)

    def steps(self, model: str) -> int:
        """Return the number of steps that a model has taken. Image age is measured in these steps."""
        return self._lanes[model].steps

    def width(self, model: str) -> int:
        """Return the maximum rows of a model's step, excluding trial widths."""
        return self._lanes[model].width

    def set_width(self, model: str, rows: int, trial_widths: Sequence[int] = ()) -> None:
        """Change a model's width from its next step on.

        Args:
            model: id of the model.
            rows: maximum rows of a step, excluding trial widths.
            trial_widths: widths used in turn by the last `TRIAL_STEPS` of every `TRIAL_INTERVAL` steps.

        Raises:
            ValueError: a width is less than 2 or greater than the configured `max_rows`.
        """
        for width in (rows, *trial_widths):
            if not 2 <= width <= self._config.max_rows:
                raise ValueError(f"the width must be between 2 and {self._config.max_rows}; got {width}")
        self._lanes[model].width, self._lanes[model].trial_widths = rows, trial_widths

    def all_steps(self) -> dict[str, int]:
        """Return the number of steps of every model."""
        return {model: lane.steps for model, lane in self._lanes.items()}

    def all_widths(self) -> dict[str, int]:
        """Return the width of every model."""
        return {model: lane.width for model, lane in self._lanes.items()}

    def add_model(self, model: str, network_of: NetworkOf | None = None) -> None:
        """Add a model to the rotation."""
        self._lanes[model] = _Lane(self._config, network_of)
        self._turn.append(model)

    def remove_model(self, model: str) -> None:
        """Remove a model.

        Raises:
            RuntimeError: the model has images in flight.
        """
        if len(self._lanes[model]):
            raise RuntimeError(f"model {model} has images in flight")
        del self._lanes[model]
        self._turn.remove(model)

    def add(self, images: Iterable[Image]) -> None:
        """Queue images for their first step. Their order must be set."""
        for image in images:
            queue = self._lanes[image.model].queue(image)
            queue.line.push(image)
            queue.shares.enter(image.client)
            self._by_request[image.request_id].add(image)
            self.remaining_row_steps += image.remaining_row_steps + image.later_row_steps

    def abort(self, request_id: str) -> list[Image]:
        """Remove a request's images in any state and return them; their rows are free at the next step."""
        aborted = sorted(self._by_request.get(request_id, ()), key=lambda image: image.position)
        for image in aborted:
            self._leave(self._lanes[image.model], image, ImageStatus.ABORTED)
        return aborted

    def schedule(self, now: float) -> StepBatch | None:
        """Pick the next step batch and start its new images; None if no image is in flight.

        Args:
            now: time.monotonic(), stored as the start time of new images.
        """
        for _ in range(len(self._turn)):
            model = self._turn[0]
            self._turn.rotate(-1)
            lane = self._lanes[model]
            if len(lane):
                return self._place(model, lane, *self._next(lane), now)
        return None

    def complete(self, batch: StepBatch, ok: list[bool]) -> list[Image]:
        """Record a step: count it, and remove the images that finished or failed.

        The images that finish are known before the device has taken the step. Failures may be reported later, by
        `fail`.

        Args:
            batch: the batch last returned by `schedule`.
            ok: for each image, whether it took the step and is still finite, or is assumed to be.

        Returns:
            The images that left, in the batch's order. Their `slot` still names the slot they held, which is now free.
        """
        lane = self._lanes[batch.model]
        lane.steps += 1
        interactive, batch_work = defaultdict[str, int](int), defaultdict[str, int](int)
        for image in batch.images:
            served = batch_work if image.request.priority is Priority.BATCH else interactive
            served[image.request.client] += image.rows
        lane.interactive.served(interactive)
        lane.batch.served(batch_work)
        self.remaining_row_steps -= batch.rows
        left = []
        for image, succeeded in zip(batch.images, ok, strict=True):
            image.steps_done += 1
            if not succeeded or image.steps_done == image.params.num_steps:
                self._leave(lane, image, ImageStatus.DONE if succeeded else ImageStatus.FAILED)
                left.append(image)
        self.order.update(batch.images)
        return left

    def fail(self, image: Image) -> bool:
        """Record that an image failed in a step that was recorded as successful.

        Returns:
            Whether the image leaves now. If it had already left, a done image becomes failed and an aborted one stays
            aborted.
        """
        if image.status in _STARTED:
            self._leave(self._lanes[image.model], image, ImageStatus.FAILED)
            return True
        if image.status is ImageStatus.DONE:
            image.status = ImageStatus.FAILED
        return False

    # Picking the images of a step

    def _next(self, lane: _Lane) -> tuple[list[Image], list[Image], int]:
        """Return the images of the next step, those among them without a slot, and the number of pre-empted ones."""
        while lane.groups:
            images = [image for image in lane.groups.popleft() if image.status in _IN_FLIGHT]
            if images:
                return images, [image for image in images if image.slot is None], 0
        images, newcomers = self._pick(lane)
        picked = set(images)
        preempted = sum([image.status in _STARTED for image in lane.last - picked])
        lane.last = picked
        if lane.network_of is not None:
            by_network: dict[int, list[Image]] = {}
            for image in images:
                by_network.setdefault(lane.network_of(image.params, image.steps_done), []).append(image)
            images, *others = by_network.values()
            lane.groups.extend(others)
            newcomers = [image for image in images if image.slot is None]
        return images, newcomers, preempted

    def _pick(self, lane: _Lane) -> tuple[list[Image], list[Image]]:
        """Choose the images of the next step. Return them and those among them without a slot; move nothing yet."""
        rows, claim = lane.most_rows(), 0
        if len(lane.interactive) and len(lane.batch):
            share = self._config.batch_share * lane.width
            lane.batch_credit = min(lane.batch_credit + share, share + 2)
            claim = min(rows, int(lane.batch_credit))
        free = rows - sum([image.rows for queue in (lane.interactive, lane.batch) for image in queue.running])
        look = max(0, free) + 1  # in most steps fewer images start
        # Interactive work that can fill the step leaves batch work its claim, and one row if only wider images are left
        batch_rows = claim + 1 if len(lane.interactive) >= rows else rows
        while True:
            interactive, batch = lane.interactive.candidates(look), lane.batch.candidates(min(look, batch_rows))
            claimed = _most_urgent(batch, claim)
            claimed_rows = sum([image.rows for image in claimed])
            picked = [*claimed, *_fitting(chain(interactive, batch[len(claimed) :]), rows - claimed_rows)]
            newcomers = [image for image in picked if image.slot is None]
            # If a candidate was not picked, later images of the same width would not be picked either
            if look >= rows or sum([image.rows for image in newcomers]) < look:
                lane.batch_credit -= claimed_rows
                return picked, newcomers
            look = min(4 * look, rows)

    # Assigning slots

    def _place(
        self, model: str, lane: _Lane, images: list[Image], newcomers: list[Image], preempted: int, now: float
    ) -> StepBatch:
        """Assign a slot to every image of the step. There are at least as many slots as rows were picked."""
        evictions = self._make_room(lane, len(newcomers)) if len(newcomers) > len(lane.free_slots) else []
        restores = []
        for image in newcomers:
            queue = lane.queue(image)
            queue.line.remove(image)
            queue.running.append(image)
            image.slot = slot = lane.free_slots.pop()
            if image.status is ImageStatus.EVICTED:
                queue.evicted.remove(image)
                restores.append(Move(image=image, slot=slot))
            else:
                image.started_at = now
            image.status = ImageStatus.RUNNING
        return StepBatch(
            model=model,
            images=tuple(images),
            steps=tuple(
                [ImageStep(i.slot, i.params, i.steps_done) for i in images if i.slot is not None]  # all have one
            ),
            evictions=tuple(evictions),
            restores=tuple(restores),
            preempted=preempted,
        )

    @staticmethod
    def _make_room(lane: _Lane, slots: int) -> list[Move]:
        """Evict the least urgent images that were not picked, batch work first."""
        evictions: list[Move] = []
        for queue in (lane.batch, lane.interactive):
            for image in sorted(queue.running, key=queue.urgency, reverse=True):
                if len(lane.free_slots) >= slots:
                    return evictions
                if image not in lane.last and image.slot is not None:
                    evictions.append(Move(image=image, slot=image.slot))
                    lane.free_slots.append(image.slot)
                    image.slot = None
                    image.status = ImageStatus.EVICTED
                    queue.running.remove(image)
                    queue.evicted.add(image)
                    queue.line.push(image)
        return evictions

    def _leave(self, lane: _Lane, image: Image, status: ImageStatus) -> None:
        queue = lane.queue(image)
        if image.status is ImageStatus.RUNNING:
            queue.running.remove(image)
            lane.free_slots.append(_slot(image))
        else:
            queue.line.remove(image)
            queue.evicted.discard(image)
        image.status = status
        self.remaining_row_steps -= image.remaining_row_steps + image.later_row_steps
        queue.shares.leave(image.client)
        siblings = self._by_request[image.request_id]
        siblings.remove(image)
        if not siblings:
            del self._by_request[image.request_id]

    def _queues(self) -> list[_Queue]:
        return [queue for lane in self._lanes.values() for queue in (lane.interactive, lane.batch)]


def _most_urgent(images: Iterable[Image], rows: int) -> list[Image]:
    """Return the longest prefix of the images that fits `rows`; accumulated rows must not go to narrower images."""
    picked = []
    for image in images:
        rows -= image.rows
        if rows < 0:
            break
        picked.append(image)
    return picked


def _fitting(images: Iterable[Image], rows: int) -> list[Image]:
    """Return the images that fit `rows`, skipping each image for which earlier ones leave too few."""
    picked = []
    for image in images:
        if image.rows <= rows:
            picked.append(image)
            rows -= image.rows
            if not rows:
                break
    return picked


_ORDER = attrgetter("order")
_STARTED = (ImageStatus.RUNNING, ImageStatus.EVICTED)
_IN_FLIGHT = (ImageStatus.WAITING, *_STARTED)


def _slot(image: Image) -> int:
    if image.slot is None:
        raise RuntimeError(f"image {image.position} of {image.request_id} runs without a slot")
    return image.slot
