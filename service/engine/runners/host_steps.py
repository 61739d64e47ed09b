"""HostSteps: steps whose network call is complete when waited for. The host computes only the places in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, on_host, to_numpy
from diffusion.noise import STREAM_STEP, normal
from diffusion.update import PlanRows, Step, advance
from service.backends.base import Denoiser
from service.backends.batch_sizes import BatchSizes
from service.backends.pending import Later, Pending
from service.engine.request import ImageStep, rows_of
from service.engine.runners.numbers import (
    K_NOISE,
    NOISE_SCALE,
    R_NOISE,
    Block,
    PlanOf,
    StepNumbers,
    classifier_block,
    classifier_numbers,
    finish_block,
    finish_numbers,
    step_block,
    step_numbers,
    words_of,
)
from service.engine.runners.step import Images, Update, finish, finished, gather, gradients, log_variances
from service.engine.runners.steps import Embeddings, classified_places, finished_places, no_classifier
from service.engine.slots import SlotTable


class HostSteps(Generic[A]):
    """Implements `Steps`. A second thread generates noise during the network call."""

    depth = 0

    def __init__(
        self,
        denoiser: Denoiser[A],
        table: SlotTable[A],
        embeddings: Embeddings[A],
        plan_of: PlanOf,
        sizes: BatchSizes,
    ) -> None:
        model = denoiser.config.model
        self._denoiser: Denoiser[A] = denoiser
        self._slots: SlotTable[A] = table
        self._embeddings: Embeddings[A] = embeddings
        self._plan_of = plan_of
        self._sizes = sizes
        self._null_class = model.num_classes or 0
        self._conditional = model.num_classes is not None
        self._beside = ThreadPoolExecutor(1, "noise")

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Gather the network's inputs and start its call. The rest of the step runs when the result is waited for.

        Everything is computed before anything is written, so that a step that raised can be repeated.
        """
        table = self._slots
        rows = rows_of(steps)
        size = self._sizes.padded_rows(rows)
        block = step_block(steps, size, self._plan_of, null_class=self._null_class)
        numbers: StepNumbers[A] = step_numbers(table.send(words_of(block)))
        inputs, images = gather(
            numbers,
            table.x,
            table.x0,
            self._embeddings.network,
            table.cond,
            places=len(steps),
            conditional=self._conditional,
        )
        call = self._denoiser.begin(inputs)
        return Later(lambda: self._finish(steps, block, numbers, images, call, guided=rows > len(steps)))

    def _finish(
        self,
        steps: Sequence[ImageStep],
        block: Block,
        numbers: StepNumbers[A],
        images: Images[A],
        call: Pending[A],
        *,
        guided: bool,
    ) -> list[bool]:
        """Start the noise, wait for the network and update the slots."""
        table, count = self._slots, len(steps)
        update = self._begin_noise(block[:count], numbers, images)
        raw = call.wait()
        grad = self._gradient(steps, images)
        result = finish(numbers, images, raw, update, grad, guided=guided)
        if following := finished_places(steps):
            self._finish_lines(steps, following, result.x_prev)
        if raw_calls := [place for place, step in enumerate(steps) if step.params.plan.kind == "denoise"]:
            places = table.integers(raw_calls)
            result.x0[places] = log_variances(numbers, raw, places, table.image_shape[0])
        slot = numbers.slot[:count]
        table.x[slot] = result.x_prev
        table.x0[slot] = result.x0
        ok: list[bool] = to_numpy(result.ok).tolist()
        return ok

    def copied(self, array: A, slots: Sequence[int]) -> Pending[npt.NDArray[np.float32]]:
        """Copy some slots of an image array; the pending result is in host memory, [n, C, H, W]."""
        copied: A = array[self._slots.integers(slots)]
        return Later(lambda: to_numpy(copied))

    def _finish_lines(self, steps: Sequence[ImageStep], following: Sequence[int], x_prev: A) -> None:
        """Change x_prev, by place, of the images with a mask or jumps."""
        table = self._slots
        block = finish_block(steps, following, len(following), self._plan_of, spare=(table.spare_slot, 0))
        numbers = finish_numbers(table.send(words_of(block)))
        keeps, jumps = (bool((block["after"][:, column] > 0).any()) for column in (K_NOISE, R_NOISE))
        given, keep = table.given[numbers.slot], table.keep[numbers.slot]
        x_prev[numbers.place] = finished(numbers, x_prev[numbers.place], given, keep, keeps=keeps, jumps=jumps)

    def _begin_noise(self, block: Block, numbers: StepNumbers[A], images: Images[A]) -> Update[A]:
        """Start generating the noise in parallel with the network call; return the update that uses it."""
        count = len(block)
        shape: tuple[int, int, int] = self._slots.image_shape
        seeds, image_indices, steps = numbers.seed[:count], numbers.image_index[:count], numbers.step[:count]
        noise: Callable[[], A]
        if not (block["plan"][:, NOISE_SCALE] > 0).any():
            noise = lambda: self._denoiser.xp.zeros_like(images.x_t)  # noqa: E731  # one of three
        elif on_host(images.x_t):
            noise = self._beside.submit(normal, seeds, image_indices, steps, STREAM_STEP, shape).result
        else:
            noise = lambda: normal(seeds, image_indices, steps, STREAM_STEP, shape)  # noqa: E731  # one of three

        def update(lines: A, x_t: A, x0_prev: A, out: A, var_values: A, _: tuple[A, A, A], grad: A | None) -> Step[A]:
            return advance(PlanRows.from_lines(lines), x_t, x0_prev, out, var_values, noise(), grad)

        return update

    def _gradient(self, steps: Sequence[ImageStep], images: Images[A]) -> A | None:
        """Call the classifier on the images with classifier guidance; the gradient of the others is zero.

        Returns:
            The scaled gradients by place, or None if no image uses classifier guidance.

        Raises:
            ModelError: an image uses classifier guidance, but the model has no classifier.
        """
        classified = classified_places(steps)
        if not classified:
            return None
        classifier, emb_t = self._denoiser.classifier, self._embeddings.classifier
        if classifier is None or emb_t is None:
            raise no_classifier(self._denoiser.description)
        size = self._sizes.padded_classified_rows(len(classified))
        spare = (steps[classified[0]].slot, classified[0])  # padding: any valid image
        block = classifier_block(steps, classified, size, self._plan_of, spare=spare)
        numbers = classifier_numbers(self._slots.send(words_of(block)))
        found = gradients(numbers, self._slots.x, emb_t, classifier)
        grad: A = self._denoiser.xp.zeros_like(images.x_t)
        grad[numbers.place[: len(classified)]] = found[: len(classified)]
        return grad
