"""Forecast: when accepted work will be done, and when new work would be. Steps are known at arrival, so this is sums.

The model, and what it leaves out:

- A step of a model takes c(rows), as measured, and g(rows) for its classifier, as many as the mean of accepted work
  has; models with work take turns.
- What is ahead of an image, by its policy's order, keeps the width full until it runs out; then its last rows drain
  while the image runs. So it waits for (work ahead) / width, less what is left of the rows that run last, which is
  taken to be what is left, on average, of those that run now; and at least until the first of these is done.
- Interactive work gets what the share of batch work leaves, where there is any; batch work waits for all interactive
  work, or gets its share, whichever is sooner. Nobody waits for more than his client's work and the allowance of
  `ClientShares`, times the clients there are.
- Nobody else comes. Later work that goes first (shorter under srw, sooner due under deadline, interactive before
  batch) makes predictions too early. Failed and cancelled work makes them too late.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.engine.config import EngineConfig
from service.engine.ordered_work import OrderedWork
from service.engine.policies import policy_named
from service.engine.request import Image, Priority
from service.engine.snapshot import Snapshot, StartedImage

_Order = tuple[float, int]
_Known = Image | StartedImage
"""An image as it was accepted, or as it was at the time of a snapshot."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What to expect of images; all zero where no step has been timed yet."""

    position: int
    """Images that come before the first of them."""
    wait_s: float
    """Until the first of them takes a step."""
    finish_s: float
    """Until the last of them is done."""


@dataclass
class _Ahead:
    """What comes before the images of one request; they join it one by one."""

    line: OrderedWork
    progress: list[tuple[_Order, int, int]]
    """What has changed in the line since its images arrived: (order, images, row-steps)."""
    taking_part: list[_Known]
    """Images that run, and those that have joined; in order."""
    interactive: int
    """Row-steps left of interactive work."""
    batch: int
    others_step_s: float
    """How long the steps take that other models with work take in turns with this one's."""
    joined_rows: int = 0
    joined_classified: int = 0
    joined_work: int = 0

    def before(self, image: _Known) -> tuple[int, int]:
        """Return how many images come before one, and their row-steps; those that joined are in the work alone."""
        count, work = self.line.before(image.order)
        for order, images, row_steps in self.progress:
            if order >= image.order:
                break
            count, work = count + images, work + row_steps
        return count, work + self.joined_work

    def join(self, image: _Known) -> None:
        """Let an image come before those of its request that are still to be predicted."""
        insort(self.taking_part, image, key=_order)
        self.joined_rows += image.rows
        self.joined_classified += image.classified_rows
        self.joined_work += image.remaining_row_steps


class Forecast:
    """Accepted images that are not done, as they were on arrival; what has become of them since is in `Snapshot`.

    It sees every image the scheduler sees, in the same order, a moment sooner.
    """

    def __init__(self, config: EngineConfig, models: Iterable[str]) -> None:
        self._policy = policy_named(config.policy, config.ageing)
        self._batch_share = config.batch_share
        self._client_allowance = config.client_allowance
        self._models: list[str] = []
        self._lines: dict[tuple[str, Priority], OrderedWork] = {}
        self._images: dict[tuple[str, int], Image] = {}
        self._client_work: Counter[tuple[str, Priority, str]] = Counter()
        self._clients: Counter[tuple[str, Priority]] = Counter()
        self._rows: Counter[str] = Counter()
        self._classified_rows: Counter[str] = Counter()
        self._arrivals = 0
        for model in models:
            self.add_model(model)

    def add_model(self, model: str) -> None:
        """Make room for a model, which every `Snapshot` holds from now on."""
        self._models.append(model)
        self._lines |= {(model, priority): OrderedWork() for priority in Priority}

    def remove_model(self, model: str) -> None:
        """Forget a model whose images are all done; a `Snapshot` may hold it for a while."""
        self._models.remove(model)
        for priority in Priority:
            del self._lines[model, priority], self._clients[model, priority]
        del self._rows[model], self._classified_rows[model]

    def predict(self, images: Sequence[Image], snapshot: Snapshot) -> Prediction:
        """Say when new images of one request would be done if they were accepted now."""
        self._arrive(images, snapshot)
        return self._predict(images, snapshot)

    def add(self, images: Sequence[Image], snapshot: Snapshot) -> None:
        """Take accepted images in."""
        self._arrive(images, snapshot)
        self._arrivals += len(images)
        for image in images:
            self._lines[image.model, image.priority].add(image.order, image.remaining_row_steps)
            self._images[image.request_id, image.position] = image
            self._rows[image.model] += image.rows
            self._classified_rows[image.model] += image.classified_rows
            client = (image.model, image.priority, image.client)
            self._clients[image.model, image.priority] += client not in self._client_work
            self._client_work[client] += image.remaining_row_steps

    def remove(self, request_id: str, position: int) -> None:
        """Forget an image that is done, whatever its end."""
        image = self._images.pop((request_id, position))
        self._lines[image.model, image.priority].remove(image.order)
        self._rows[image.model] -= image.rows
        self._classified_rows[image.model] -= image.classified_rows
        client = (image.model, image.priority, image.client)
        self._client_work[client] -= image.remaining_row_steps
        if not self._client_work[client]:
            del self._client_work[client]
            self._clients[image.model, image.priority] -= 1

    def eta(self, request_id: str, count: int, snapshot: Snapshot) -> Prediction | None:
        """Say when an accepted request of so many images will be done; None: it is."""
        started = {(image.request_id, image.position): image for image in snapshot.started}
        ids = [(request_id, position) for position in range(count)]
        images: list[_Known] = [started.get(i, self._images[i]) for i in ids if i in self._images]
        return self._predict(images, snapshot) if images else None

    def backlog_s(self, snapshot: Snapshot) -> float:
        """Say how long everything accepted will take."""
        done = self._progress(self._started(snapshot))
        total = 0.0
        for model in self._models:
            width = snapshot.widths[model]
            work = sum(self._lines[model, priority].work - done[model, priority] for priority in Priority)
            total += work / width * self._step_s(model, width, snapshot)
        return total

    def _step_s(self, model: str, rows: int, snapshot: Snapshot, new_rows: int = 0, new_classified: int = 0) -> float:
        """Say how long a step of so many rows takes, where the classifier is asked as often as in all accepted work."""
        all_rows = self._rows[model] + new_rows
        classified = self._classified_rows[model] + new_classified
        return snapshot.costs[model].seconds(rows, rows * classified / all_rows if classified else 0)

    def _arrive(self, images: Sequence[Image], snapshot: Snapshot) -> None:
        for sequence, image in enumerate(images, self._arrivals):
            image.sequence = sequence
            image.arrival_step = snapshot.steps[image.model]
            image.order = (self._policy(image), sequence)

    def _predict(self, images: Sequence[_Known], snapshot: Snapshot) -> Prediction:
        """Predict images of one request: all of them accepted, or none."""
        ordered = sorted(images, key=_order)
        known = (ordered[0].request_id, ordered[0].position) in self._images
        ahead = self._ahead(ordered[0], snapshot)
        predicted = []
        for image in ordered:
            predicted.append(self._predict_image(image, ahead, snapshot, known=known))
            if not known:
                ahead.join(image)
        return Prediction(
            position=min(p.position for p in predicted),
            wait_s=min(p.wait_s for p in predicted),
            finish_s=max(p.finish_s for p in predicted),
        )

    def _ahead(self, image: _Known, snapshot: Snapshot) -> _Ahead:
        """Sum up what all images of a request share."""
        model, priority = image.model, image.priority
        running = sorted((image for image in self._started(snapshot) if image.model == model), key=_order)
        done = self._progress(running)
        return _Ahead(
            line=self._lines[model, priority],
            progress=self._progress_by_order(running, priority),
            taking_part=[image for image in running if image.remaining_row_steps],
            interactive=self._lines[model, Priority.INTERACTIVE].work - done[model, Priority.INTERACTIVE],
            batch=self._lines[model, Priority.BATCH].work - done[model, Priority.BATCH],
            others_step_s=sum(
                self._step_s(other, snapshot.widths[other], snapshot)
                for other in self._models
                if other != model and any(self._lines[other, p].work for p in Priority)
            ),
        )

    def _predict_image(self, image: _Known, ahead: _Ahead, snapshot: Snapshot, *, known: bool) -> Prediction:
        model, priority, width = image.model, image.priority, snapshot.widths[image.model]
        position, work = ahead.before(image)

        clients = self._clients[model, priority]
        own = self._client_work[model, priority, image.client] + ahead.joined_work
        if known:
            own -= self._images[image.request_id, image.position].remaining_row_steps
        else:
            clients += (model, priority, image.client) not in self._client_work
        work = min(work, (own + image.remaining_row_steps + self._client_allowance) * clients)

        if priority is Priority.INTERACTIVE:
            wait_steps = work / (width - (self._batch_share * width if ahead.batch > 0 else 0.0))
        else:
            wait_steps = (work + ahead.interactive) / width
            if ahead.interactive > 0 and self._batch_share > 0:
                wait_steps = min(wait_steps, work / (self._batch_share * width))
        mean_left, least_left = _drain(ahead.taking_part, image, width)
        new_rows = 0 if known else ahead.joined_rows + image.rows
        new_classified = 0 if known else ahead.joined_classified + image.classified_rows
        rows = self._rows[model] + new_rows
        wait_steps = max(least_left, wait_steps - mean_left) if rows > width else 0.0

        step_s = self._step_s(model, min(rows, width), snapshot, new_rows, new_classified)
        if step_s:
            step_s += ahead.others_step_s
        finish_steps = wait_steps + image.remaining_row_steps / image.rows
        if priority is Priority.BATCH and ahead.interactive > 0 and self._batch_share > 0:
            # While there is interactive work, its own steps come at the rate of the share too
            work += image.remaining_row_steps
            finish_steps = max(
                finish_steps, min(work / (self._batch_share * width), (work + ahead.interactive) / width)
            )
        return Prediction(position=position, wait_s=wait_steps * step_s, finish_s=finish_steps * step_s)

    def _started(self, snapshot: Snapshot) -> list[StartedImage]:
        """Return the images that have started and are not done: a snapshot keeps some that are."""
        return [image for image in snapshot.started if (image.request_id, image.position) in self._images]

    def _progress_by_order(self, running: Iterable[StartedImage], priority: Priority) -> list[tuple[_Order, int, int]]:
        """Return what running has changed in a line, as `_Ahead.progress`: out of the old place, into the new one."""
        changes = []
        for image in running:
            if image.priority is priority:
                known = self._images[image.request_id, image.position]
                changes.append((known.order, -1, -known.remaining_row_steps))
                changes.append((image.order, +1, +image.remaining_row_steps))
        return sorted(changes)

    def _progress(self, running: Iterable[StartedImage]) -> Counter[tuple[str, Priority]]:
        """Return the row-steps that images have taken since they arrived, by model and priority."""
        done: Counter[tuple[str, Priority]] = Counter()
        for image in running:
            known = self._images[image.request_id, image.position]
            done[image.model, image.priority] += known.remaining_row_steps - image.remaining_row_steps
        return done


def _order(image: _Known) -> _Order:
    return image.order


def _drain(taking_part: Iterable[_Known], image: _Known, width: int) -> tuple[float, float]:
    """Return the mean steps left, by row, of what comes before an image, and how long until a row is free for it."""
    rows = work = 0
    least = math.inf
    for other in taking_part:
        if rows >= width or other.order >= image.order:
            break
        rows += other.rows
        work += other.remaining_row_steps
        least = min(least, other.remaining_row_steps / other.rows)
    return work / rows if rows else 0.0, least if rows + image.rows > width else 0.0
