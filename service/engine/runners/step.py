"""One step, written once: `gather` makes what the network is called on, `finish` the next images of what it returns.

Both are pure functions of arrays. On a CPU they are called, on CUDA they are captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple

from diffusion.arrays import A
from diffusion.guidance import classifier_free, scaled_gradient
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_STEP, unchecked_normal
from diffusion.update import PlanRows, Step, split_output, traceable_advance
from service.engine.runners.numbers import ClassifierNumbers, StepNumbers


class Images(NamedTuple, Generic[A]):
    """What the images of a step hold as it begins, by place [n, C, H, W]."""

    x_t: A
    x0_prev: A


Update = Callable[[A, A, A, A, A, tuple[A, A, A], A | None], Step[A]]
"""Takes the step once the network has answered; `add_noise_and_advance` describes its arguments."""


def gather(
    numbers: StepNumbers[A], x: A, x0: A, emb_t: A, *, places: int, conditional: bool
) -> tuple[NetworkInputs[A], Images[A]]:
    """Return what the network is called on, and what its images hold.

    Args:
        numbers: of the step.
        x: x_t by slot.
        x0: the previous step's x0 by slot.
        emb_t: the embedded timesteps, by training timestep.
        places: how many of the block's places have an image, or are to be computed with those that have.
        conditional: whether the network takes labels.
    """
    slot = numbers.slot[:places]
    images: Images[A] = Images(x[slot], x0[slot])
    labels = numbers.row_label if conditional else None
    return NetworkInputs(images.x_t[numbers.row_place], emb_t[numbers.row_timestep], labels), images


def finish(
    numbers: StepNumbers[A], images: Images[A], raw: A, update: Update[A], grad: A | None, *, guided: bool
) -> Step[A]:
    """Return what a step gives, by place.

    Args:
        numbers: of the step.
        images: as `gather` returned them.
        raw: what the network returned, by row.
        update: takes the step.
        grad: the classifier's scaled gradient by place; None where no image asks for it.
        guided: whether some images may have classifier-free guidance.
    """
    places, channels = images.x_t.shape[:2]
    out = raw[:places]
    if guided:
        out = classifier_free(raw[numbers.uncond_row[:places]], out, numbers.cfg_scale[:places], channels)
    prediction, var_values = split_output(out, channels)
    noise_of = (numbers.seed[:places], numbers.image_index[:places], numbers.step[:places])
    return update(numbers.plan[:places], images.x_t, images.x0_prev, prediction, var_values, noise_of, grad)


def gradients(numbers: ClassifierNumbers[A], x: A, emb_t: A, classifier: Callable[[NetworkInputs[A]], A]) -> A:
    """Return a classifier's scaled gradients, by row of its call; x is x_t by slot, emb_t as for `gather`."""
    out = classifier(NetworkInputs(x[numbers.slot], emb_t[numbers.timestep], numbers.label))
    return scaled_gradient(out, numbers.scale)


def add_noise_and_advance(
    lines: A, x_t: A, x0_prev: A, out: A, var_values: A, noise_of: tuple[A, A, A], grad: A | None
) -> Step[A]:
    """Make a step's noise and take the step: everything that comes after the network, and nothing but pointwise work.

    Args:
        lines: of the plan, one per row, float32 [B, 12].
        x_t: as for `advance`, like x0_prev, out, var_values and grad.
        x0_prev: see there.
        out: see there.
        var_values: see there.
        noise_of: seed, image index and step of each row, int64 [B].
        grad: see there.
    """
    _, channels, height, width = x_t.shape
    z = unchecked_normal(*noise_of, STREAM_STEP, (channels, height, width))
    return traceable_advance(PlanRows.from_lines(lines), x_t, x0_prev, out, var_values, z, grad)
