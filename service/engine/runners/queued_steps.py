"""Steps on a device that answers later: each a captured graph, which the host tells one small layout and nothing else.

All else is the device's work, of one batch size: gather, network, guidance, noise, update, scatter, increments, flags.
The classifier's gradient depends on x_t, timestep, class and scale only, so it is captured by itself and runs before
the step, for those steps in which an image asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace, to_numpy
from diffusion.guidance import classifier_free, scaled_gradient
from diffusion.update import split_output, to_uint8
from service.backends.base import Denoiser, FailureKind
from service.backends.device_queue import DeviceQueue
from service.backends.pending import Later, Pending
from service.engine.runners.layout import lay_out, lay_out_classified
from service.engine.runners.steps import Padded, add_noise_and_advance
from service.engine.slots import SlotTable
from service.errors import ModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fixed(Generic[A]):
    """Work of one batch size on arrays that stay where they are."""

    layout: A
    """int64; what the host writes."""
    run: Callable[[], A]
    captured: bool
    """Whether it is run as a graph."""


class QueuedSteps(Generic[A]):
    """Implements `Steps`."""

    def __init__(
        self,
        denoiser: Denoiser[A],
        queue: DeviceQueue[A],
        table: SlotTable[A],
        padded_rows: Padded,
        padded_classified_rows: Padded,
        *,
        most_rows: int,
        strict: bool,
    ) -> None:
        """Allocate; nothing is captured yet.

        Args:
            denoiser: whose network is run, through its queue.
            queue: of the device.
            table: of the images.
            padded_rows: of the network.
            padded_classified_rows: of the classifier.
            most_rows: rows of the largest network call.
            strict: whether a batch size that was not captured is an error.
        """
        model, xp = denoiser.config.model, denoiser.xp
        self.depth = queue.depth
        self._denoiser: Denoiser[A] = denoiser
        self._queue: DeviceQueue[A] = queue
        self._slots: SlotTable[A] = table
        self._padded_rows = padded_rows
        self._padded_classified_rows = padded_classified_rows
        self._strict = strict
        self._channels = model.image_channels
        self._null_class = model.num_classes or 0
        self._conditional = model.num_classes is not None
        self._advance = queue.fuse(add_noise_and_advance)
        self._steps: dict[int, _Fixed[A]] = {}
        self._gradients: dict[int, _Fixed[A]] = {}
        self._most = most_rows
        self._gradient: A = xp.zeros((most_rows + 1, *table.image_shape), dtype=xp.float32, device=denoiser.device)
        """By place, and one that is nobody's at the end; zero for images that do not ask for it."""
        self._guided_before = False
        """Whether the gradient may be anything but zero."""

    def capture(self, sizes: Sequence[int], classified_sizes: Sequence[int]) -> None:
        """Capture every size, the largest first, and check that graphs do what they were captured from.

        Where there is no memory for a graph, its work will be done without. Moves the images in the first slots, which
        must be some, and puts them back.

        Raises:
            ModelError: no memory for a graph, in strict mode.
            RuntimeError: a graph that gives other numbers than what it was captured from.
        """
        for size in sorted(classified_sizes, reverse=True):
            self._gradients[size] = self._capture(self._classifier_call(size), "a classifier's gradient", size)
        for size in sorted(sizes, reverse=True):
            self._steps[size] = self._capture(self._step(size), "a step", size)

    def has_captured(self, size: int) -> bool:
        """Say whether steps of a size are graphs."""
        return size in self._steps and self._steps[size].captured

    def launch(self, slots: Sequence[int]) -> Pending[list[bool]]:
        """Queue a step; the host waits for nothing."""
        table = self._slots
        guided = [place for place, slot in enumerate(slots) if table.is_guided[slot]]
        asking = [place for place, slot in enumerate(slots) if table.is_classified[slot]]
        size = self._padded_rows(len(slots) + len(guided))
        step = self._steps.get(size) or self._uncaptured(self._step(size), "a step", size)
        if self._guided_before:
            self._gradient[:] = 0.0
            self._guided_before = False
        if asking:
            self._guide(slots, asking)
        step.layout[:] = self._queue.send(lay_out(slots, guided, size, table.spare_slot))
        flags = self._queue.fetch(step.run()[: len(slots)])
        return Later(lambda: [bool(ok) for ok in flags.wait()])

    def pixels(self, array: A, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy some slots of an array of images; waited for, as pixels."""
        xp = namespace(array)
        images = self._queue.fetch(xp.stack([array[slot] for slot in slots]))  # an index would be sent, and waited for

        def wait() -> npt.NDArray[np.uint8]:
            with np.errstate(invalid="ignore"):  # an image may have failed since: its pixels are not looked at
                return to_uint8(images.wait())

        return Later(wait)

    def _guide(self, slots: Sequence[int], asking: Sequence[int]) -> None:
        if self._queue.classifier is None:
            raise ModelError(
                f"{self._denoiser.description}: the model has no classifier, and classifier_scale is not 0"
            )
        size = self._padded_classified_rows(len(asking))
        call = self._gradients.get(size) or self._uncaptured(self._classifier_call(size), "a gradient", size)
        call.layout[:] = self._queue.send(lay_out_classified(slots, asking, size, (self._slots.spare_slot, self._most)))
        self._guided_before = True
        call.run()

    # Work on fixed arrays

    def _step(self, size: int) -> _Fixed[A]:
        """Return what takes a step of the images that its layout names; it returns their flags, bool [size]."""
        table = self._slots
        layout = self._layout(lay_out((), (), size, table.spare_slot))
        gradient = None if self._queue.classifier is None else self._gradient[:size]

        def step() -> A:
            xp = namespace(table.x)
            slot, row_image, row_is_null, uncond_row = layout[0], layout[1], layout[2], layout[3]
            x_t, x0_prev, steps = table.x[slot], table.x0[slot], table.step[slot]
            line = table.plan_offset[slot] + steps
            emb_t = table.emb_t[line]
            labels = xp.where(row_is_null == 1, self._null_class, table.y[slot][row_image])
            raw = self._queue.network(x_t[row_image], emb_t[row_image], labels if self._conditional else None)
            out = classifier_free(raw[uncond_row], raw, table.cfg_scale[slot], self._channels)
            prediction, var_values = split_output(out, self._channels)
            noise_of = (table.seed[slot], table.image_index[slot], steps)
            result = self._advance(table.plan[line], x_t, x0_prev, prediction, var_values, noise_of, gradient)
            is_image = slot != table.spare_slot
            pixel = xp.reshape(is_image, (-1, 1, 1, 1))
            table.x[slot] = xp.where(pixel, result.x_prev, 0.0)
            table.x0[slot] = xp.where(pixel, result.x0, 0.0)
            table.step[slot] = steps + xp.astype(is_image, xp.int64)
            ok: A = result.ok
            return ok

        return _Fixed(layout, step, captured=False)

    def _classifier_call(self, size: int) -> _Fixed[A]:
        """Return what writes the gradients of the images that its layout names; it returns all gradients."""
        table, gradients, classifier = self._slots, self._gradient, self._queue.classifier
        layout = self._layout(lay_out_classified((), (), size, (table.spare_slot, self._most)))
        assert classifier is not None  # noqa: S101  # or there would be no sizes

        def guide() -> A:
            slot, place = layout[0], layout[1]
            line = table.plan_offset[slot] + table.step[slot]
            out = classifier(table.x[slot], table.classifier_emb_t[line], table.y[slot])
            gradients[place] = scaled_gradient(out, table.classifier_scale[slot])
            return gradients

        return _Fixed(layout, guide, captured=False)

    # Capturing

    def _layout(self, values: npt.NDArray[np.int64]) -> A:
        xp = self._denoiser.xp
        layout: A = xp.zeros(values.shape, dtype=xp.int64, device=self._denoiser.device)
        layout[:] = self._queue.send(values)
        return layout

    def _uncaptured(self, work: _Fixed[A], what: str, size: int) -> _Fixed[A]:
        if self._strict:
            raise ModelError(f"{self._denoiser.description}: {what} of {size} rows was not captured")
        return work

    def _capture(self, work: _Fixed[A], what: str, size: int) -> _Fixed[A]:
        """Capture work, and compare what both do; where there is no memory for a graph, return the work itself."""
        try:
            graph = _Fixed(work.layout, self._queue.capture(work.run), captured=True)
        except Exception as error:
            if self._denoiser.classify(error) is not FailureKind.OUT_OF_MEMORY:
                raise
            log.warning("%s: no memory to capture %s of %d rows", self._denoiser.description, what, size)
            return self._uncaptured(work, what, size)
        if self._trial(graph, size) != self._trial(work, size):
            raise RuntimeError(
                f"{self._denoiser.description}: {what} of {size} rows gives other numbers as a graph than without"
            )
        return graph

    def _trial(self, work: _Fixed[A], size: int) -> list[bytes]:
        """Do work for the images in the first slots, return all that came of it, and put everything back."""
        table = self._slots
        moved: tuple[Any, ...] = (table.x, table.x0, table.step, self._gradient)
        before = [to_numpy(array).copy() for array in moved]
        slots: Sequence[int] = range(min(size, table.spare_slot))
        if work.layout.shape[0] == 4:
            work.layout[:] = self._queue.send(lay_out(slots, (), size, table.spare_slot))
        else:
            work.layout[:] = self._queue.send(lay_out_classified(slots, slots, size, (table.spare_slot, self._most)))
        out = work.run()
        found = [to_numpy(array).tobytes() for array in (out[: len(slots)], *(array[: len(slots)] for array in moved))]
        for array, values in zip(moved, before, strict=True):
            array[:] = self._queue.send(values)
        return found
