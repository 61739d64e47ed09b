"""Steps where a network call is over when it is waited for: only what is there is computed, and the host does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, on_host, to_numpy
from diffusion.guidance import classifier_free, scaled_gradient
from diffusion.noise import STREAM_STEP, normal
from diffusion.update import PlanRows, begin_advance, finish_advance, split_output, to_uint8
from service.backends.base import Denoiser, beginning_of
from service.backends.pending import Later, Pending
from service.engine.runners.layout import ROW_IMAGE, ROW_IS_NULL, UNCOND_ROW, lay_out
from service.engine.runners.steps import BatchSizes, no_classifier
from service.engine.slots import SlotTable


class _Gathered(NamedTuple, Generic[A]):
    """What a step's images hold as it begins."""

    slots: Sequence[int]
    where: A
    """The same, as an array."""
    x_t: A
    step: A
    line: A
    """Of the plan table."""
    y: A


class HostSteps(Generic[A]):
    """Implements `Steps`. Noise is made by a thread beside, while the network is called."""

    depth = 0

    def __init__(self, denoiser: Denoiser[A], table: SlotTable[A], sizes: BatchSizes) -> None:
        model = denoiser.config.model
        self._denoiser: Denoiser[A] = denoiser
        self._begin: Callable[[A, A, A | None], Pending[A]] = beginning_of(denoiser)
        self._slots: SlotTable[A] = table
        self._sizes = sizes
        self._channels = model.image_channels
        self._null_class = model.num_classes or 0
        self._conditional = model.num_classes is not None
        self._beside = ThreadPoolExecutor(1, "noise")

    def launch(self, slots: Sequence[int]) -> Pending[list[bool]]:
        """Gather what the network reads, and begin its call; all else is done when the step is waited for.

        All is computed before anything is written, so that a step that raised can be taken again.
        """
        table = self._slots
        index = table.integers(slots)
        step = table.step[index]
        line = table.plan_offset[index] + step
        images: _Gathered[A] = _Gathered(slots, index, table.x[index], step, line, table.y[index])
        guided: list[int] = [place for place, slot in enumerate(slots) if table.is_guided[slot]]
        size: int = self._sizes.padded_rows(len(slots) + len(guided))
        layout = None if size == len(slots) else lay_out(slots, guided, size, spare_slot=0)  # padding: any row will do
        call: Pending[A] = self._begin_network(images, layout)
        uncond_rows = None if layout is None or not guided else layout[UNCOND_ROW, : len(slots)]
        return Later(lambda: self._finish(images, uncond_rows, call))

    def _finish(self, images: _Gathered[A], uncond_rows: npt.NDArray[np.int64] | None, call: Pending[A]) -> list[bool]:
        """Do what can be done meanwhile, wait for the network, and update."""
        table, index = self._slots, images.where
        rows = PlanRows.from_lines(table.plan[images.line])
        noise = self._begin_noise(rows, images)
        with np.errstate(over="ignore", invalid="ignore"):  # a row that stops being finite is told of by `ok`
            begun = begin_advance(rows, images.x_t, table.x0[index])
        next_step = images.step + 1
        asking = [place for place, slot in enumerate(images.slots) if table.is_classified[slot]]
        # Here: a copy to a device waits for what it is doing
        uncond = None if uncond_rows is None else table.send(uncond_rows)

        out = call.wait()
        raw, out = out, out[: len(images.slots)]
        if uncond is not None:
            out = classifier_free(raw[uncond], out, table.cfg_scale[index], self._channels)
        prediction, var_values = split_output(out, self._channels)
        gradient = self._gradient(images, asking) if asking else None
        with np.errstate(over="ignore", invalid="ignore"):
            result = finish_advance(begun, prediction, var_values, noise(), gradient)

        table.x[index] = result.x_prev
        table.x0[index] = result.x0
        table.step[index] = next_step
        ok: list[bool] = to_numpy(result.ok).tolist()
        return ok

    def pixels(self, array: A, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy some slots of an array of images; waited for, as pixels."""
        copied: A = array[self._slots.integers(slots)]
        return Later(lambda: to_uint8(copied))

    def _begin_noise(self, rows: PlanRows[A], images: _Gathered[A]) -> Callable[[], A]:
        """Return what gives the step's noise; on the host it is made meanwhile, while the network is called."""
        shape: tuple[int, int, int] = self._slots.image_shape
        seeds, image_indices, steps = self._slots.seed[images.where], self._slots.image_index[images.where], images.step
        if not on_host(seeds):
            return lambda: normal(seeds, image_indices, steps, STREAM_STEP, shape)
        if not bool((rows.noise_scale > 0).any()):
            return lambda: self._denoiser.xp.zeros_like(images.x_t)
        return self._beside.submit(normal, seeds, image_indices, steps, STREAM_STEP, shape).result

    def _begin_network(self, images: _Gathered[A], layout: npt.NDArray[np.int64] | None) -> Pending[A]:
        """Begin a call on the images, or on the rows that they have by a layout."""
        x_t, emb_t, labels = images.x_t, self._slots.emb_t[images.line], images.y
        if layout is not None:
            rows = self._slots.send(layout[ROW_IMAGE])
            x_t, emb_t, labels = x_t[rows], emb_t[rows], labels[rows]
            labels[self._slots.send(np.flatnonzero(layout[ROW_IS_NULL]))] = self._null_class
        return self._begin(x_t, emb_t, labels if self._conditional else None)

    def _gradient(self, images: _Gathered[A], asking: Sequence[int]) -> A:
        """Call the classifier on the images that ask for it; the others' gradient is zero.

        Raises:
            ModelError: an image that asks for a classifier that is not there.
        """
        table = self._slots
        if self._denoiser.classifier is None:
            raise no_classifier(self._denoiser.description)
        count: int = len(asking)
        padding: list[int] = [asking[0]] * (self._sizes.padded_classified_rows(count) - count)
        rows = table.integers([*asking, *padding])
        out = self._denoiser.classifier(images.x_t[rows], table.classifier_emb_t[images.line[rows]], images.y[rows])
        scale = table.classifier_scale[images.where[rows[:count]]]
        gradient: A = self._denoiser.xp.zeros_like(images.x_t)
        gradient[rows[:count]] = scaled_gradient(out[:count], scale)
        return gradient
