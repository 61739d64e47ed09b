"""The numbers of a step, packed into one block that is copied from the host to the device.

A block is a structured numpy array on the host and an array of int64 words on the device. Each line describes both a
place of the step and a row of the network call; both counts equal the batch size. Images come first, then a second row
for each image with classifier-free guidance, then padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace
from diffusion.plans import AFTER_COLUMNS, PLAN_COLUMNS, SamplingPlan
from service.engine.request import ImageStep, PlanKey

PlanOf = Callable[[PlanKey], SamplingPlan]
Block = npt.NDArray[np.void]

STEP_BLOCK = np.dtype(
    [
        # by place
        ("slot", "i8"),
        ("step", "i8"),
        ("seed", "i8"),
        ("image_index", "i8"),
        ("uncond_row", "i8"),  # the image's row without class; its own row if it is not guided
        # by network row
        ("row_place", "i8"),  # place of the row's image
        ("row_label", "i8"),
        ("row_timestep", "i8"),
        # by place
        ("plan", "f4", (len(PLAN_COLUMNS),)),
        ("cfg_scale", "f4"),
        ("gives_log_variance", "f4"),  # 1 for raw calls, else 0
    ]
)
CLASSIFIER_BLOCK = np.dtype(
    [("slot", "i8"), ("place", "i8"), ("label", "i8"), ("timestep", "i8"), ("scale", "f4"), ("unused", "f4")]
)
FINISH_BLOCK = np.dtype(
    [
        ("slot", "i8"),
        ("place", "i8"),
        ("step", "i8"),
        ("seed", "i8"),
        ("image_index", "i8"),
        ("after", "f4", (len(AFTER_COLUMNS),)),
        ("keeps", "f4"),  # 1 if the image has a mask, else 0: its slot may hold another image's
    ]
)
_STEP_WORDS = 8
_CLASSIFIER_WORDS = 4
_FINISH_WORDS = 5
NOISE_SCALE = PLAN_COLUMNS.index("noise_scale")
K_NOISE, R_NOISE = (AFTER_COLUMNS.index(name) for name in ("k_noise", "r_noise"))


class StepNumbers(NamedTuple, Generic[A]):
    """Columns of a step's block on the device, int64 [n] unless noted; `STEP_BLOCK` lists which are by place."""

    slot: A
    step: A
    seed: A
    image_index: A
    uncond_row: A
    row_place: A
    row_label: A
    row_timestep: A
    plan: A
    """float32 [n, 12]."""
    cfg_scale: A
    """float32 [n]."""
    gives_log_variance: A
    """float32 [n]."""


class ClassifierNumbers(NamedTuple, Generic[A]):
    """Columns of a classifier call's block on the device, int64 [n] unless noted."""

    slot: A
    place: A
    label: A
    timestep: A
    scale: A
    """float32 [n]."""


class FinishNumbers(NamedTuple, Generic[A]):
    """Columns of the block of what follows the lines of some images, on the device, int64 [n] unless noted."""

    slot: A
    place: A
    step: A
    seed: A
    image_index: A
    after: A
    """float32 [n, 5]."""
    keeps: A
    """float32 [n]."""


def step_block(
    steps: Sequence[ImageStep], size: int, plan_of: PlanOf, *, null_class: int, spare_slot: int = 0
) -> Block:
    """Return the block of a step, [size].

    Args:
        steps: the images' steps, in order; at most `size` rows, counting a second row for each guided image.
        size: rows of the network call.
        plan_of: returns the sampling plan of a key.
        null_class: label of rows without class.
        spare_slot: slot of places without an image.
    """
    block = np.zeros(size, dtype=STEP_BLOCK)
    block["slot"] = spare_slot
    block["uncond_row"] = range(size)
    row = len(steps)
    for place, (slot, params, step) in enumerate((s.slot, s.params, s.step) for s in steps):
        plan = plan_of(params.plan)
        timestep, uncond_row = plan.timesteps[step], place
        if params.rows == 2:
            uncond_row, row = row, row + 1
            block["row_place"][uncond_row] = place
            block["row_label"][uncond_row] = null_class
            block["row_timestep"][uncond_row] = timestep
        whose = (slot, step, params.seed, params.image_index, uncond_row)
        is_raw = params.plan.kind == "denoise"
        block[place] = (*whose, place, params.class_index or 0, timestep, plan.table[step], params.cfg_scale, is_raw)
    return block


def classifier_block(
    steps: Sequence[ImageStep], classified: Sequence[int], size: int, plan_of: PlanOf, *, spare: tuple[int, int]
) -> Block:
    """Return the block of a classifier call, [size].

    Args:
        steps: the steps of all images.
        classified: places of the images with classifier guidance.
        size: rows of the classifier call.
        plan_of: returns the sampling plan of a key.
        spare: slot and place of padding rows.
    """
    block = np.zeros(size, dtype=CLASSIFIER_BLOCK)
    block["slot"], block["place"] = spare
    for row, place in enumerate(classified):
        step = steps[place]
        timestep = plan_of(step.params.plan).timesteps[step.step]
        block[row] = (step.slot, place, step.params.class_index or 0, timestep, step.params.classifier_scale, 0)
    return block


def finish_block(
    steps: Sequence[ImageStep], finished: Sequence[int], size: int, plan_of: PlanOf, *, spare: tuple[int, int]
) -> Block:
    """Return the block of what follows the lines of some images, [size].

    Args:
        steps: the steps of all images.
        finished: places of the images with a mask or jumps.
        size: rows of the block.
        plan_of: returns the sampling plan of a key.
        spare: slot and place of padding rows, which keep no pixel and do not jump.
    """
    block = np.zeros(size, dtype=FINISH_BLOCK)
    block["slot"], block["place"] = spare
    for row, place in enumerate(finished):
        slot, params, step = steps[place]
        after = plan_of(params.plan).after
        assert after is not None  # noqa: S101  # every plan that can have a mask or jumps has it
        block[row] = (slot, place, step, params.seed, params.image_index, after[step], params.has_mask)
    return block


def words_of(block: Block) -> npt.NDArray[np.int64]:
    """Return a block as int64 words [n, words], the form that is copied to the device."""
    return block.view(np.int64).reshape(len(block), -1)


def step_numbers(words: A) -> StepNumbers[A]:
    """Return the named columns of a step's block."""
    floats = _floats(words, _STEP_WORDS)
    return StepNumbers._make(
        [
            *(words[:, k] for k in range(_STEP_WORDS)),
            floats[:, : len(PLAN_COLUMNS)],
            floats[:, len(PLAN_COLUMNS)],
            floats[:, len(PLAN_COLUMNS) + 1],
        ]
    )


def classifier_numbers(words: A) -> ClassifierNumbers[A]:
    """Return the named columns of a classifier call's block."""
    scale = _floats(words, _CLASSIFIER_WORDS)[:, 0]
    return ClassifierNumbers._make([*(words[:, k] for k in range(_CLASSIFIER_WORDS)), scale])


def finish_numbers(words: A) -> FinishNumbers[A]:
    """Return the named columns of the block of what follows lines."""
    floats = _floats(words, _FINISH_WORDS)
    after, keeps = floats[:, : len(AFTER_COLUMNS)], floats[:, len(AFTER_COLUMNS)]
    return FinishNumbers._make([*(words[:, k] for k in range(_FINISH_WORDS)), after, keeps])


def _floats(words: Any, start: int) -> Any:
    return words[:, start:].view(namespace(words).float32)
