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
from service.engine.runners.layout import (
    IMAGE_SLOT,
    ROW_IMAGE,
    ROW_IS_NULL,
    UNCOND_ROW,
    lay_out,
    lay_out_classified,
)
from service.engine.runners.steps import BatchSizes, add_noise_and_advance, no_classifier
from service.engine.slots import SlotTable
from service.errors import ModelError

log = logging.getLogger(__name__)

FUSED_TOLERANCE = 1e-5
"""How far noise and update as one kernel may be from both apart: rounding, and no wrong noise."""


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
        sizes: BatchSizes,
        *,
        strict: bool,
    ) -> None:
        """Allocate; nothing is captured yet.

        Args:
            denoiser: whose network is run, through its queue.
            queue: of the device.
            table: of the images.
            sizes: that calls may have; `capture` needs all of them, and nothing before it but the largest.
            strict: whether a batch size that was not captured is an error.
        """
        model, xp = denoiser.config.model, denoiser.xp
        self.depth = queue.depth
        self._denoiser: Denoiser[A] = denoiser
        self._queue: DeviceQueue[A] = queue
        self._slots: SlotTable[A] = table
        self._sizes = sizes
        self._strict = strict
        self._channels = model.image_channels
        self._null_class = model.num_classes or 0
        self._conditional = model.num_classes is not None
        self._advance = queue.fuse(add_noise_and_advance)
        self._steps: dict[int, _Fixed[A]] = {}
        self._gradients: dict[int, _Fixed[A]] = {}
        self._most = sizes.network[-1]
        self._gradient: A = xp.zeros((self._most + 1, *table.image_shape), dtype=xp.float32, device=denoiser.device)
        """By place, and one that is nobody's at the end; zero for images that do not ask for it."""
        self._guided_before = False
        """Whether the gradient may be anything but zero."""

    def capture(self) -> None:
        """Capture every size, the largest first, and check that graphs do what they were captured from.

        Where there is no memory for a graph, its work will be done without. Moves the images in the first slots, which
        must be some, and puts them back.

        Raises:
            ModelError: no memory for a graph, in strict mode.
            RuntimeError: a graph that gives other numbers than what it was captured from, or one kernel of noise and
                update than both apart.
        """
        self._compare_fused(min(self._sizes.network[-1], self._slots.spare_slot))
        for size in sorted(self._sizes.classifier, reverse=True):
            self._gradients[size] = self._capture(self._classifier_call(size), "a classifier's gradient", size)
        for size in sorted(self._sizes.network, reverse=True):
            self._steps[size] = self._capture(self._step(size), "a step", size)

    def has_captured(self, size: int) -> bool:
        """Say whether steps of a size are graphs."""
        return size in self._steps and self._steps[size].captured

    def launch(self, slots: Sequence[int]) -> Pending[list[bool]]:
        """Queue a step; the host waits for nothing."""
        table = self._slots
        guided = [place for place, slot in enumerate(slots) if table.is_guided[slot]]
        asking = [place for place, slot in enumerate(slots) if table.is_classified[slot]]
        size = self._sizes.padded_rows(len(slots) + len(guided))
        step = self._steps.get(size) or self._uncaptured(self._step(size), "a step", size)
        if self._guided_before:
            self._gradient[:] = 0.0
            self._guided_before = False
        if asking:
            self._guide(slots, asking)
        step.layout[:] = self._queue.send(lay_out(slots, guided, size, table.spare_slot))
        receive = self._queue.receive((len(slots),), self._denoiser.xp.bool)  # once the step is queued, memory must do
        flags = receive(step.run()[: len(slots)])
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
            raise no_classifier(self._denoiser.description)
        size = self._sizes.padded_classified_rows(len(asking))
        call = self._gradients.get(size) or self._uncaptured(self._classifier_call(size), "a gradient", size)
        call.layout[:] = self._queue.send(lay_out_classified(slots, asking, size, (self._slots.spare_slot, self._most)))
        self._guided_before = True
        call.run()

    # Work on fixed arrays

    def _step(self, size: int) -> _Fixed[A]:
        """Return what takes a step of the images that its layout names; it returns their flags, bool [size]."""
        # No closure over `self`, which keeps the work: weights that are dropped must leave memory at once
        table, network, advance = self._slots, self._queue.network, self._advance
        channels, null_class, conditional = self._channels, self._null_class, self._conditional
        layout = self._layout(lay_out((), (), size, table.spare_slot))
        gradient = None if self._queue.classifier is None else self._gradient[:size]

        def step() -> A:
            xp = namespace(table.x)
            slot, row_image = layout[IMAGE_SLOT], layout[ROW_IMAGE]
            row_is_null, uncond_row = layout[ROW_IS_NULL], layout[UNCOND_ROW]
            x_t, x0_prev, steps = table.x[slot], table.x0[slot], table.step[slot]
            line = table.plan_offset[slot] + steps
            emb_t = table.emb_t[line]
            labels = xp.where(row_is_null == 1, null_class, table.y[slot][row_image])
            raw = network(x_t[row_image], emb_t[row_image], labels if conditional else None)
            out = classifier_free(raw[uncond_row], raw, table.cfg_scale[slot], channels)
            prediction, var_values = split_output(out, channels)
            noise_of = (table.seed[slot], table.image_index[slot], steps)
            result = advance(table.plan[line], x_t, x0_prev, prediction, var_values, noise_of, gradient)
            is_image = slot != table.spare_slot
            pixel = xp.reshape(is_image, (-1, 1, 1, 1))
            x, x0 = xp.where(pixel, result.x_prev, 0.0), xp.where(pixel, result.x0, 0.0)
            steps_after = steps + xp.astype(is_image, xp.int64)
            table.x[slot], table.x0[slot], table.step[slot] = x, x0, steps_after  # all, or none where memory is short
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
            equal = self._trial(graph, size) == self._trial(work, size)
        except Exception as error:
            if self._denoiser.classify(error) is not FailureKind.OUT_OF_MEMORY:
                raise
            log.warning("%s: no memory to capture %s of %d rows", self._denoiser.description, what, size)
            return self._uncaptured(work, what, size)
        if not equal:
            raise RuntimeError(
                f"{self._denoiser.description}: {what} of {size} rows gives other numbers as a graph than without"
            )
        return graph

    def _compare_fused(self, rows: int) -> None:
        """Refuse a fused update whose numbers are not those of the plain one, for the images in the first slots."""
        if self._advance is add_noise_and_advance:
            return
        table, gradient = self._slots, None if self._queue.classifier is None else self._gradient[:rows]
        line = table.plan_offset[:rows] + table.step[:rows]
        raw = self._queue.network(table.x[:rows], table.emb_t[line], table.y[:rows] if self._conditional else None)
        noise_of = (table.seed[:rows], table.image_index[:rows], table.step[:rows])
        out = split_output(raw, self._channels)
        fused, plain = (
            to_numpy(advance(table.plan[line], table.x[:rows], table.x0[:rows], *out, noise_of, gradient).x_prev)
            for advance in (self._advance, add_noise_and_advance)
        )
        if not np.allclose(fused, plain, rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE):
            raise RuntimeError(f"{self._denoiser.description}: noise and update give other numbers as one kernel")

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
