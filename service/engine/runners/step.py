"""One sampling step for all devices: `gather` builds the network's inputs, `finish` computes the next images.

Both are pure functions of arrays: called directly on a CPU, captured as a graph on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple

from diffusion.arrays import A, namespace
from diffusion.guidance import classifier_free, scaled_gradient
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_JUMP, STREAM_KEPT, STREAM_STEP, unchecked_normal
from diffusion.update import (
    AfterRows,
    PlanRows,
    Step,
    finish_line,
    interpolated_log_variance,
    split_output,
    traceable_advance,
)
from service.backends.device_queue import Normal
from service.engine.runners.numbers import ClassifierNumbers, FinishNumbers, StepNumbers


class Images(NamedTuple, Generic[A]):
    """State of a step's images at its start, by place [n, C, H, W]."""

    x_t: A
    x0_prev: A


Update = Callable[[A, A, A, A, A, tuple[A, A, A], A | None], Step[A]]
"""Computes the next images from the network's output; see `add_noise_and_advance` for the arguments."""


def gather(
    numbers: StepNumbers[A], x: A, x0: A, emb_t: A, cond: A | None, *, places: int, conditional: bool
) -> tuple[NetworkInputs[A], Images[A]]:
    """Return the network's inputs and the state of the step's images.

    Args:
        numbers: numbers of the step.
        x: x_t by slot.
        x0: the previous step's x0 by slot.
        emb_t: the embedded timesteps, by training timestep.
        cond: conditioning images by slot; None for a model that takes none.
        places: number of the block's places to compute: those with an image, or more.
        conditional: whether the network takes labels.
    """
    slot = numbers.slot[:places]
    images: Images[A] = Images(x[slot], x0[slot])
    labels = numbers.row_label if conditional else None
    conds = None if cond is None else cond[slot[numbers.row_place]]
    return NetworkInputs(images.x_t[numbers.row_place], emb_t[numbers.row_timestep], labels, conds), images


def finish(
    numbers: StepNumbers[A], images: Images[A], raw: A, update: Update[A], grad: A | None, *, guided: bool
) -> Step[A]:
    """Return the result of a step, by place.

    Args:
        numbers: numbers of the step.
        images: image state returned by `gather`.
        raw: the network's output, by row.
        update: computes the next images.
        grad: the classifier's scaled gradient, by place; None if no image uses classifier guidance.
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
    """Return a classifier's scaled gradients, by row of its call; `x` is x_t by slot, `emb_t` is as for `gather`."""
    out = classifier(NetworkInputs(x[numbers.slot], emb_t[numbers.timestep], numbers.label))
    return scaled_gradient(out, numbers.scale)


def log_variances(numbers: StepNumbers[A], raw: A, places: A | slice, channels: int) -> A:
    """Return the log variance of the images at some places: the second result of a raw call.

    Args:
        numbers: numbers of the step.
        raw: the network's output, by row; an image's own row is that of its place.
        places: places of images.
        channels: C, channels of the images.
    """
    _, var_values = split_output(raw[places], channels)
    return interpolated_log_variance(PlanRows.from_lines(numbers.plan[places]), var_values)


def finished(
    numbers: FinishNumbers[A],
    x_prev: A,
    given: A,
    keep: A,
    *,
    keeps: bool = True,
    jumps: bool = True,
    normal: Normal[A] = unchecked_normal,
) -> A:
    """Return x_prev of some images after what follows their lines; contains only pointwise operations.

    Args:
        numbers: numbers of these images.
        x_prev: results of their step [n, C, H, W].
        given: the given images of their slots, shaped like x_prev.
        keep: how much of each given pixel their slots keep [n, 1, H, W].
        keeps: whether some may keep pixels.
        jumps: whether some may jump.
        normal: generates the noise.
    """
    xp = namespace(x_prev)
    _, channels, height, width = x_prev.shape

    def noise(stream: int) -> A:
        whose = (numbers.seed, numbers.image_index, numbers.step)
        return normal(*whose, stream, (channels, height, width))

    zeros = xp.zeros_like(x_prev)
    return finish_line(
        AfterRows.from_lines(numbers.after),
        x_prev,
        given,
        keep * xp.reshape(numbers.keeps, (-1, 1, 1, 1)),
        noise(STREAM_KEPT) if keeps else zeros,
        noise(STREAM_JUMP) if jumps else zeros,
    )


def add_noise_and_advance(
    lines: A,
    x_t: A,
    x0_prev: A,
    out: A,
    var_values: A,
    noise_of: tuple[A, A, A],
    grad: A | None,
    normal: Normal[A] = unchecked_normal,
) -> Step[A]:
    """Generate a step's noise and take the step: all work after the network. Contains only pointwise operations.

    Args:
        lines: lines of the plan, one per row, float32 [B, 12].
        x_t: as for `advance`.
        x0_prev: as for `advance`.
        out: as for `advance`.
        var_values: as for `advance`.
        noise_of: seed, image index and step of each row, int64 [B].
        grad: as for `advance`.
        normal: generates the noise.
    """
    _, channels, height, width = x_t.shape
    z = normal(*noise_of, STREAM_STEP, (channels, height, width))
    return traceable_advance(PlanRows.from_lines(lines), x_t, x0_prev, out, var_values, z, grad)
