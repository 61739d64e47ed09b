"""Forecast: predict when accepted or new work will finish. The number of steps is known at arrival, so sums suffice.

Assumptions and limits of the model:

- A step of a model takes c(rows), as measured, plus g(rows) for its classifier, with the mean number of classifier
  rows of the accepted work. Models with work take turns.
- The work ahead of an image, in the policy's order, fills the width until it runs out; its last rows then drain while
  the image runs. The wait is therefore (work ahead) / width, minus the remaining steps of the rows that run last. These
  are estimated by the mean remaining steps of the rows that run now. The wait lasts at least until the first of these
  rows finishes, or of those that waiting images of its priority will take in the next step because they are free.
- Interactive work gets the rows that the share of batch work leaves, if there is batch work. Batch work waits for all
  interactive work, or gets its share, whichever is sooner. No image waits for more than (the work of its client + the
  allowance of `ClientShares`) * (number of clients).
- The second stage of an image of a cascade is predicted when its first one is: it begins when that is done, or when the
  work that is ahead of it now is done, whichever is later. For other requests it is work only once it has begun.
- No further work arrives. Later work that is served first (shorter under srw, earlier due under deadline, interactive
  before batch) makes predictions too early. Failed and cancelled work makes them too late.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter

from service.engine.config import EngineConfig
from service.engine.ledger import Ledger, Line
from service.engine.request import Image, Order, Priority
from service.engine.snapshot import PlacedImage, Snapshot

_ORDER = attrgetter("order")
"""Sort key of `PlacedImage`."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted times of the images of a request; the times are 0 if no step has been timed yet."""

    position: int
    """Number of images ahead of the first one."""
    wait_s: float
    """Seconds until the first one takes a step."""
    finish_s: float
    """Seconds until the last one completes."""


@dataclass
class _Ahead:
    """Work ahead of the images of one request. Each predicted image is added to it before the next is predicted."""

    line: Line
    progress: list[tuple[Order, int, int]]
    """Changes to the line since its images arrived: (order, images, row-steps), sorted."""
    taking_part: list[PlacedImage]
    """Images that have started or joined, sorted."""
    starting: list[PlacedImage]
    """Waiting images that will take the rows that are free now, sorted."""
    interactive: int
    """Remaining row-steps of interactive work."""
    batch: int
    """Remaining row-steps of batch work."""
    others_step_s: float
    """Seconds of one step of each other model with work; these steps alternate with this model's."""
    joined_rows: int = 0
    joined_classified: int = 0
    joined_work: int = 0

    def before(self, order: Order) -> tuple[int, int]:
        """Return the number of images before `order` and their row-steps. Joined images count only in the row-steps."""
        count, work = self.line.work.before(order)
        for place, images, row_steps in self.progress:
            if place >= order:
                break
            count, work = count + images, work + row_steps
        return count, work + self.joined_work

    def join(self, placed: PlacedImage) -> None:
        """Add a predicted image to the work ahead of the remaining images of its request."""
        insort(self.taking_part, placed, key=_ORDER)
        self.joined_rows += placed.image.rows
        self.joined_classified += placed.image.classified_rows
        self.joined_work += placed.remaining_row_steps


class Forecast:
    """Computes predictions from the ledger (accepted work) and a snapshot (its progress). Holds no state of its own."""

    def __init__(self, config: EngineConfig, ledger: Ledger) -> None:
        self._batch_share = config.batch_share
        self._client_allowance = config.client_allowance
        self._ledger = ledger

    def predict(self, images: Sequence[Image], snapshot: Snapshot) -> Prediction:
        """Predict when the new images of one request would finish if accepted now. Their arrival order must be set."""
        placed = [PlacedImage(image, image.order, image.row_steps) for image in images]
        return self._with_next_stages(self._predict(placed, snapshot, known=False), images, snapshot)

    def eta(self, request_id: str, snapshot: Snapshot) -> Prediction | None:
        """Predict when an accepted request will finish; None if all its images have ended."""
        images, orders = self._ledger.unfinished(request_id), self._ledger.orders
        started = {placed.image: placed for placed in snapshot.started if placed.image.request_id == request_id}
        by_model: dict[str, list[PlacedImage]] = {}
        for image in images:
            by_model.setdefault(image.model, []).append(
                started.get(image) or PlacedImage(image, orders[image], image.row_steps)
            )
        predicted = [
            self._with_next_stages(
                self._predict(placed, snapshot, known=True), [image for image, *_ in placed], snapshot
            )
            for placed in by_model.values()
        ]
        return _together(predicted) if predicted else None

    def backlog_s(self, snapshot: Snapshot) -> float:
        """Predict the seconds until all accepted work is finished."""
        done: Counter[str] = Counter()
        for image, _, remaining in self._started(snapshot):
            done[image.model] += image.row_steps - remaining
        total = 0.0
        for model, accepted in self._ledger.models.items():
            width = snapshot.widths[model]
            total += (
                (accepted.row_steps + accepted.expected - done[model]) / width * self._step_s(model, width, snapshot)
            )
        return total

    def _step_s(self, model: str, rows: int, snapshot: Snapshot, new_rows: int = 0, new_classified: int = 0) -> float:
        """Predict the seconds of a step of `rows` rows, with the mean classifier rows of the accepted work."""
        accepted = self._ledger.models[model]
        all_rows = accepted.rows + new_rows
        classified = accepted.classified_rows + new_classified
        return snapshot.costs[model].seconds(rows, rows * classified / all_rows if classified else 0)

    def _predict(self, images: Sequence[PlacedImage], snapshot: Snapshot, *, known: bool) -> Prediction:
        """Predict images of one request: all of them accepted (`known`), or none."""
        ordered = sorted(images, key=_ORDER)
        ahead = self._ahead(ordered[0].image, snapshot)
        predicted = []
        for placed in ordered:
            predicted.append(self._predict_image(placed, ahead, snapshot, known=known))
            if not known:
                ahead.join(placed)
        return _together(predicted)

    def _with_next_stages(self, first: Prediction, images: Iterable[Image], snapshot: Snapshot) -> Prediction:
        """Add the second stages of images to the prediction of their first ones.

        A second stage waits for the first, and for the work ahead of it, which is done meanwhile.
        """
        placed = [PlacedImage(i.then, i.then.order, i.then.row_steps) for i in images if i.then is not None]
        if not placed:  # as for all but cascades
            return first
        second = self._predict(placed, snapshot, known=False)
        return replace(first, finish_s=max(first.finish_s, second.wait_s) + second.finish_s - second.wait_s)

    def _ahead(self, image: Image, snapshot: Snapshot) -> _Ahead:
        """Compute the work ahead that all images of a request have in common."""
        model, priority = image.model, image.priority
        accepted = self._ledger.models[model]
        own: dict[str, int] = {}  # rows of the request's first stages, which will have ended before its second ones run
        if image.stage and image not in self._ledger.orders:
            for other in self._ledger.unfinished(image.request_id):
                own[other.model] = own.get(other.model, 0) + other.rows
        started = sorted([placed for placed in self._started(snapshot) if placed.image.model == model], key=_ORDER)
        interactive, batch = accepted.interactive.work.work, accepted.batch.work.work
        for image_ahead, _, remaining in started:
            if image_ahead.request.priority is Priority.BATCH:
                batch -= image_ahead.row_steps - remaining
            else:
                interactive -= image_ahead.row_steps - remaining
        line = accepted.line(priority)
        taking_part = [placed for placed in started if placed.remaining_row_steps]
        free = snapshot.widths[model] - sum([placed.image.rows for placed in taking_part])
        return _Ahead(
            line=line,
            progress=self._progress([placed for placed in started if placed.image.request.priority is priority]),
            taking_part=taking_part,
            starting=_starting(line, started, free) if free > 0 else [],
            interactive=interactive,
            batch=batch,
            others_step_s=sum(
                self._step_s(other, snapshot.widths[other], snapshot)
                for other, work in self._ledger.models.items()
                if other != model and work.rows > own.get(other, 0)
            ),
        )

    def _predict_image(self, placed: PlacedImage, ahead: _Ahead, snapshot: Snapshot, *, known: bool) -> Prediction:
        image, order, remaining = placed
        model, priority, client = image.model, image.priority, image.client
        width = snapshot.widths[model]
        position, work = ahead.before(order)

        clients = len(ahead.line.clients)
        own = ahead.line.clients[client] + ahead.joined_work
        if known:
            own -= image.row_steps
        else:
            clients += client not in ahead.line.clients
        work = min(work, (own + remaining + self._client_allowance) * clients)

        if priority is Priority.INTERACTIVE:
            wait_steps = work / (width - (self._batch_share * width if ahead.batch > 0 else 0.0))
        else:
            wait_steps = (work + ahead.interactive) / width
            if ahead.interactive > 0 and self._batch_share > 0:
                wait_steps = min(wait_steps, work / (self._batch_share * width))
        mean_left, least_left = _drain(ahead, placed, width)
        new_rows = 0 if known else ahead.joined_rows + image.rows
        new_classified = 0 if known else ahead.joined_classified + image.classified_rows
        rows = self._ledger.models[model].rows + new_rows
        wait_steps = max(least_left, wait_steps - mean_left) if rows > width else 0.0

        step_s = self._step_s(model, min(rows, width), snapshot, new_rows, new_classified)
        if step_s:
            step_s += ahead.others_step_s
        finish_steps = wait_steps + remaining / image.rows
        if priority is Priority.BATCH and ahead.interactive > 0 and self._batch_share > 0:
            # While there is interactive work, the image's own steps are limited to the batch share as well
            work += remaining
            finish_steps = max(
                finish_steps, min(work / (self._batch_share * width), (work + ahead.interactive) / width)
            )
        return Prediction(position=position, wait_s=wait_steps * step_s, finish_s=finish_steps * step_s)

    def _started(self, snapshot: Snapshot) -> list[PlacedImage]:
        """Return the images that have started and not ended. A snapshot may contain ended images."""
        orders = self._ledger.orders
        return [placed for placed in snapshot.started if placed.image in orders]

    def _progress(self, started: Iterable[PlacedImage]) -> list[tuple[Order, int, int]]:
        """Return the changes of `_Ahead.progress`: each image leaves its old place and enters its new one."""
        changes = []
        for image, order, remaining in started:
            changes.append((self._ledger.orders[image], -1, -image.row_steps))
            changes.append((order, +1, +remaining))
        return sorted(changes)


def _together(predicted: Sequence[Prediction]) -> Prediction:
    """Return the prediction for all images of some predictions."""
    if len(predicted) == 1:
        return predicted[0]
    return Prediction(
        position=min(p.position for p in predicted),
        wait_s=min(p.wait_s for p in predicted),
        finish_s=max(p.finish_s for p in predicted),
    )


def _starting(line: Line, started: Collection[PlacedImage], free: int) -> list[PlacedImage]:
    """Return the images of a line that will take the free rows of the next step."""
    begun = {placed.image for placed in started}
    found: list[PlacedImage] = []
    for order in islice(line.work, len(begun) + free):
        image = line.images[order]
        if image not in begun and image.rows <= free:
            found.append(PlacedImage(image, order, image.row_steps))
            free -= image.rows
    return found


def _drain(ahead: _Ahead, placed: PlacedImage, width: int) -> tuple[float, float]:
    """Return the mean remaining steps per row of the images ahead, and the steps until a row is free for this one."""
    rows = work = 0
    least = math.inf
    for image, order, remaining in ahead.taking_part:
        if rows >= width or order >= placed.order:
            break
        rows += image.rows
        work += remaining
        least = min(least, remaining / image.rows)
    mean = work / rows if rows else 0.0
    for image, order, remaining in ahead.starting:
        if order >= placed.order:
            break
        rows += image.rows
        least = min(least, remaining / image.rows)
    return mean, least if rows + placed.image.rows > width else 0.0
