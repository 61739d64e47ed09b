"""QueuedSteps: steps on an asynchronous device. Each step is a captured graph; the host copies in one block of numbers.

The device does everything else, at one batch size: gather, network, guidance, noise, update, scatter, flags.
What follows the lines of images with a mask or with jumps is captured separately, too, and runs after the step, only if
the step has such images.

The classifier's gradient depends only on x_t, timestep, class and scale. It is captured separately and runs before the
step, only if an image in the step uses classifier guidance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace, to_numpy
from service.backends.base import Denoiser, FailureKind
from service.backends.batch_sizes import BatchSizes
from service.backends.device_queue import DeviceQueue
from service.backends.pending import Later, Pending
from service.engine.request import ImageStep, rows_of
from service.engine.runners.numbers import (
    R_NOISE,
    Block,
    PlanOf,
    classifier_block,
    classifier_numbers,
    finish_block,
    finish_numbers,
    step_block,
    step_numbers,
    words_of,
)
from service.engine.runners.step import (
    finish,
    finished,
    gather,
    gradients,
    log_variances,
)
from service.engine.runners.steps import (
    Embeddings,
    StepIncomplete,
    classified_places,
    finished_places,
    no_classifier,
)
from service.engine.runners.update_form import are_equal, choose_update
from service.engine.slots import SlotTable
from service.errors import ModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fixed(Generic[A]):
    """Work of one batch size on arrays at fixed addresses."""

    words: A
    """Input that the host writes: a block of numbers as int64 words."""
    run: Callable[[], A]
    captured: bool
    """Whether `run` replays a graph."""


class QueuedSteps(Generic[A]):
    """Implements `Steps`."""

    def __init__(
        self,
        denoiser: Denoiser[A],
        queue: DeviceQueue[A],
        table: SlotTable[A],
        embeddings: Embeddings[A],
        plan_of: PlanOf,
        sizes: BatchSizes,
        *,
        strict: bool,
    ) -> None:
        """Allocate the arrays; capture nothing yet.

        Args:
            denoiser: the denoiser whose network runs through `queue`.
            queue: queue of the device.
            table: slots of the images.
            embeddings: embedded timesteps.
            plan_of: returns the sampling plan of a key.
            sizes: allowed batch sizes. `capture` needs all of them; before it, only the largest is needed.
            strict: whether a batch size without a captured graph is an error.
        """
        model, xp = denoiser.config.model, denoiser.xp
        self.depth = queue.depth
        self._denoiser: Denoiser[A] = denoiser
        self._queue: DeviceQueue[A] = queue
        self._slots: SlotTable[A] = table
        self._embeddings: Embeddings[A] = embeddings
        self._plan_of = plan_of
        self._sizes = sizes
        self._strict = strict
        self._null_class = model.num_classes or 0
        self._conditional = model.num_classes is not None
        self._update = choose_update(queue, denoiser, sizes.network[-1])
        self._steps: dict[int, _Fixed[A]] = {}
        self._gradients: dict[int, _Fixed[A]] = {}
        self._finishes: dict[int, _Fixed[A]] = {}
        self._most = sizes.network[-1]
        self._gradient: A = xp.zeros((self._most + 1, *table.image_shape), dtype=xp.float32, device=denoiser.device)
        """Gradient by place, with a spare place at the end; zero for images without classifier guidance."""
        self._guided_before = False
        """Whether the gradient may be nonzero."""

    @property
    def update_form(self) -> str:
        """Return the name of the form in which noise and update run; see `UpdateForm`."""
        return self._update.name

    def capture(self, steps: Sequence[ImageStep]) -> None:
        """Capture a graph for every batch size, the largest first, and compare each graph with the uncaptured work.

        A batch size whose graph does not fit in memory runs without a graph.

        Args:
            steps: steps of unguided test images, one per slot; the slots are modified and restored.

        Raises:
            ModelError: a graph does not fit in memory, in strict mode.
            RuntimeError: a graph's results differ from those of the uncaptured work, or the results of the fused kernel
                of noise and update differ from those of separate operations for some batch size.
        """
        self._refuse_unequal_kernels()
        for size in sorted(self._sizes.classifier, reverse=True):
            self._gradients[size] = self._classifier_call(size)
        for size in sorted(self._sizes.network, reverse=True):
            self._steps[size] = self._step(size)
            self._finishes[size] = self._finish(size)
        for uncaptured in (self._gradients, self._steps, self._finishes):
            for work in uncaptured.values():
                self._warm_up(work)
        for size, work in self._gradients.items():
            block = self._classifier_block(steps[:size], range(len(steps[:size])), size)
            self._gradients[size] = self._capture(work, "a classifier's gradient", size, block)
        for size, work in self._steps.items():
            self._steps[size] = self._capture(work, "a step", size, self._step_block(steps[:size], size))
        for size, work in self._finishes.items():
            block = self._finish_block(steps[:size], range(len(steps[:size])), size)
            block["keeps"], block["after"][:, R_NOISE] = 1.0, 0.5
            self._finishes[size] = self._capture(work, "the end of a step", size, block)

    def has_captured(self, size: int) -> bool:
        """Return whether steps of a batch size run as graphs."""
        return size in self._steps and self._steps[size].captured

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Queue a step without blocking the host."""
        classified = classified_places(steps)
        size = self._sizes.padded_rows(rows_of(steps))
        step = self._steps.get(size) or self._uncaptured(self._step(size), "a step", size)
        if self._guided_before:
            self._gradient[:] = 0.0
            self._guided_before = False
        if classified:
            self._guide(steps, classified)
        step.words[:] = self._queue.send(words_of(self._step_block(steps, size)))
        ending = self._prepared_finish(steps)
        # Allocate before the step is queued: it must not run out of memory afterwards
        receive = self._queue.receive((len(steps),), self._denoiser.xp.bool)
        flags = receive(step.run()[: len(steps)])
        if ending is not None:
            try:
                ending.run()
            except Exception as error:
                raise StepIncomplete("the step was queued, but what follows it was not") from error
        return Later(lambda: [bool(ok) for ok in flags.wait()])

    def copied(self, array: A, slots: Sequence[int]) -> Pending[npt.NDArray[np.float32]]:
        """Start copying some slots of an image array; the pending result is in host memory, [n, C, H, W]."""
        xp = namespace(array)
        # No index array: copying one to the device would block
        return self._queue.fetch(xp.stack([array[slot] for slot in slots]))

    def _prepared_finish(self, steps: Sequence[ImageStep]) -> _Fixed[A] | None:
        """Return the work that follows a step, with its numbers sent; None if nothing follows."""
        following = finished_places(steps)
        if not following:
            return None
        size = self._sizes.padded_rows(len(following))
        work = self._finishes.get(size) or self._uncaptured(self._finish(size), "the end of a step", size)
        work.words[:] = self._queue.send(words_of(self._finish_block(steps, following, size)))
        return work

    def _guide(self, steps: Sequence[ImageStep], classified: Sequence[int]) -> None:
        if self._queue.classifier is None:
            raise no_classifier(self._denoiser.description)
        size = self._sizes.padded_classified_rows(len(classified))
        call = self._gradients.get(size) or self._uncaptured(self._classifier_call(size), "a gradient", size)
        call.words[:] = self._queue.send(words_of(self._classifier_block(steps, classified, size)))
        self._guided_before = True
        call.run()

    def _step_block(self, steps: Sequence[ImageStep], size: int) -> Block:
        return step_block(steps, size, self._plan_of, null_class=self._null_class, spare_slot=self._slots.spare_slot)

    def _classifier_block(self, steps: Sequence[ImageStep], classified: Sequence[int], size: int) -> Block:
        return classifier_block(steps, classified, size, self._plan_of, spare=(self._slots.spare_slot, self._most))

    def _finish_block(self, steps: Sequence[ImageStep], following: Sequence[int], size: int) -> Block:
        return finish_block(steps, following, size, self._plan_of, spare=(self._slots.spare_slot, 0))

    # Work on arrays at fixed addresses

    def _step(self, size: int) -> _Fixed[A]:
        """Return the work of a step of the images in its block; running it returns their flags, bool [size]."""
        # No closure over `self`, which holds the work: the cycle would delay freeing the weights of a dropped model
        table, network, advance = self._slots, self._queue.network, self._update.advance
        emb_t, conditional = self._embeddings.network, self._conditional
        words = self._words(self._step_block((), size))
        grad = None if self._queue.classifier is None else self._gradient[:size]

        def step() -> A:
            xp, numbers = namespace(table.x), step_numbers(words)
            inputs, images = gather(numbers, table.x, table.x0, emb_t, table.cond, places=size, conditional=conditional)
            raw = network(inputs)
            result = finish(numbers, images, raw, advance, grad, guided=True)
            is_raw = xp.reshape(numbers.gives_log_variance > 0, (-1, 1, 1, 1))
            x0 = xp.where(is_raw, log_variances(numbers, raw, slice(size), table.image_shape[0]), result.x0)
            is_image = xp.reshape(numbers.slot != table.spare_slot, (-1, 1, 1, 1))
            # Compute both before writing: running out of memory must not leave only one written
            x, x0 = xp.where(is_image, result.x_prev, 0.0), xp.where(is_image, x0, 0.0)
            table.x[numbers.slot], table.x0[numbers.slot] = x, x0
            ok: A = result.ok
            return ok

        return _Fixed(words, step, captured=False)

    def _finish(self, size: int) -> _Fixed[A]:
        """Return the work that follows the step of the images in its block; running it returns their x_prev."""
        table, normal, words = self._slots, self._queue.normal, self._words(self._finish_block((), (), size))

        def follow() -> A:
            numbers = finish_numbers(words)
            slot = numbers.slot
            x: A = finished(numbers, table.x[slot], table.given[slot], table.keep[slot], normal=normal)
            table.x[slot] = x
            return x

        return _Fixed(words, follow, captured=False)

    def _classifier_call(self, size: int) -> _Fixed[A]:
        """Return the work that writes the gradients of the images in its block; running it returns all gradients."""
        table, written, classifier = self._slots, self._gradient, self._queue.classifier
        emb_t = self._embeddings.classifier
        words = self._words(self._classifier_block((), (), size))
        assert classifier is not None  # noqa: S101  # without a classifier there are no sizes
        assert emb_t is not None  # noqa: S101

        def guide() -> A:
            numbers = classifier_numbers(words)
            written[numbers.place] = gradients(numbers, table.x, emb_t, classifier)
            return written

        return _Fixed(words, guide, captured=False)

    # Capturing

    def _words(self, block: Block) -> A:
        values = words_of(block)
        xp = self._denoiser.xp
        words: A = xp.zeros(values.shape, dtype=xp.int64, device=self._denoiser.device)
        words[:] = self._queue.send(values)
        return words

    def _uncaptured(self, work: _Fixed[A], what: str, size: int) -> _Fixed[A]:
        if self._strict:
            raise ModelError(f"{self._denoiser.description}: {what} of {size} rows was not captured")
        return work

    def _warm_up(self, work: _Fixed[A]) -> None:
        try:
            self._queue.warm_up(work.run)
        except Exception as error:
            if self._denoiser.failure_kind(error) is not FailureKind.OUT_OF_MEMORY:
                raise  # work without enough memory is reported when it is captured

    def _capture(self, work: _Fixed[A], what: str, size: int, block: Block) -> _Fixed[A]:
        """Capture work as a graph and compare their results. If the graph does not fit in memory, return the work."""
        try:
            graph = _Fixed(work.words, self._queue.capture(work.run), captured=True)
            equal = self._trial(graph, block) == self._trial(work, block)
        except Exception as error:
            if self._denoiser.failure_kind(error) is not FailureKind.OUT_OF_MEMORY:
                raise
            log.warning("%s: not enough memory to capture %s of %d rows", self._denoiser.description, what, size)
            return self._uncaptured(work, what, size)
        if not equal:
            raise RuntimeError(
                f"{self._denoiser.description}: {what} of {size} rows gives different results with and without a graph"
            )
        return graph

    def _refuse_unequal_kernels(self) -> None:
        """Raise if the kernel of some batch size gives other results; each size has a kernel of its own."""
        if self.update_form == "separate":
            return
        for size in self._sizes.network:
            if not are_equal(self._update.advance, self._queue, self._denoiser, size):
                raise RuntimeError(
                    f"{self._denoiser.description}: fused noise and update of {size} rows differ from separate "
                    "ones; IDDPM_FUSE_UPDATE=false turns them off"
                )

    def _trial(self, work: _Fixed[A], block: Block) -> list[bytes]:
        """Run work on a block, return what it wrote to the rows it uses as bytes, and restore the arrays."""
        count = min(len(block), self._slots.spare_slot)
        used: list[A] = [array[:count] for array in (self._slots.x, self._slots.x0, self._gradient)]
        before = [to_numpy(rows).copy() for rows in used]
        work.words[:] = self._queue.send(words_of(block))
        out = work.run()
        written: list[A] = [out[:count]]
        written += used
        found = [to_numpy(rows).tobytes() for rows in written]
        for rows, values in zip(used, before, strict=True):
            rows[:] = self._queue.send(values)
        return found
