from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from diffusion.chains import Resample, build_chain
from diffusion.config import DiffusionConfig
from diffusion.plans import SamplingPlan
from service.engine.request import GivenArrays, ImageStep, PlanKey
from service.engine.runners.numbers import (
    classifier_block,
    classifier_numbers,
    finish_block,
    finish_numbers,
    step_block,
    step_numbers,
    words_of,
)
from service.engine.runners.steps import finished_places
from tests.fakes import params

DIFFUSION = DiffusionConfig(num_timesteps=1000)
NULL_CLASS = 4
LAST_SEED = 2**53 - 1
STEPS = [
    ImageStep(slot=7, params=replace(params(20, cfg_scale=2.5, seed=LAST_SEED), class_index=3), step=0),
    ImageStep(slot=3, params=replace(params(50, seed=5, classifier_scale=1.5), image_index=2**32 - 1), step=49),
    ImageStep(slot=5, params=replace(params(20, cfg_scale=0.0), class_index=None), step=4),
]
KINDS = pytest.mark.parametrize("send", [lambda words: words, torch.from_numpy], ids=["numpy", "torch"])
Send = Callable[[npt.NDArray[np.int64]], Any]


def plan_of(key: PlanKey) -> SamplingPlan:
    return build_chain(DIFFUSION, key)


@KINDS
def test_a_step_s_numbers_have_the_places_of_its_images(send: Send) -> None:
    block = step_block(STEPS, 8, plan_of, null_class=NULL_CLASS, spare_slot=9)
    numbers = step_numbers(send(words_of(block)))
    timesteps = [plan_of(step.params.plan).timesteps[step.step] for step in STEPS]
    assert numbers.slot.tolist() == [7, 3, 5, 9, 9, 9, 9, 9]
    assert numbers.uncond_row.tolist() == [3, 1, 4, 3, 4, 5, 6, 7]
    assert numbers.row_place.tolist()[:5] == [0, 1, 2, 0, 2]
    assert numbers.row_label.tolist()[:5] == [3, 0, 0, NULL_CLASS, NULL_CLASS]
    assert numbers.row_timestep.tolist()[:5] == [*timesteps, timesteps[0], timesteps[2]]
    assert max(numbers.row_place.tolist()[5:]) < 3  # padding repeats some image


@KINDS
def test_a_step_s_numbers_belong_to_their_images(send: Send) -> None:
    numbers = step_numbers(send(words_of(step_block(STEPS, 5, plan_of, null_class=NULL_CLASS))))
    assert numbers.seed.tolist()[:3] == [LAST_SEED, 5, 0]
    assert numbers.image_index.tolist()[:3] == [0, 2**32 - 1, 0]
    assert numbers.step.tolist()[:3] == [0, 49, 4]
    assert numbers.cfg_scale.tolist()[:3] == [2.5, 1.0, 0.0]
    for line, step in zip(numbers.plan, STEPS, strict=False):
        np.testing.assert_array_equal(np.asarray(line), plan_of(step.params.plan).table[step.step])


@KINDS
def test_a_classifier_s_numbers_are_those_of_the_images_with_classifier_guidance(send: Send) -> None:
    block = classifier_block(STEPS, [1], 4, plan_of, spare=(9, 8))
    numbers = classifier_numbers(send(words_of(block)))
    assert numbers.slot.tolist() == [3, 9, 9, 9]
    assert numbers.place.tolist() == [1, 8, 8, 8]
    assert numbers.scale.tolist() == [1.5, 0, 0, 0]
    assert numbers.timestep.tolist()[0] == plan_of(STEPS[1].params.plan).timesteps[49] == 0
    assert numbers.label.tolist()[0] == 0


@KINDS
def test_the_numbers_of_what_follows_are_those_of_the_images_with_masks_or_jumps(send: Send) -> None:
    resampled = PlanKey(spec="20", resample=Resample(2, 3))
    mask = GivenArrays(image=np.zeros((1, 8, 8), dtype=np.float32), mask=np.ones((1, 8, 8), dtype=np.float32))
    steps = [
        STEPS[0],
        ImageStep(slot=4, params=replace(params(20, seed=LAST_SEED), plan=resampled), step=5),
        ImageStep(slot=6, params=replace(params(20, seed=3), image_index=9, given=mask), step=19),
    ]
    assert finished_places(steps) == [1, 2]
    block = finish_block(steps, [1, 2], 4, plan_of, spare=(9, 0))
    assert words_of(block).nbytes == block.nbytes
    numbers = finish_numbers(send(words_of(block)))
    assert numbers.slot.tolist() == [4, 6, 9, 9]
    assert numbers.place.tolist() == [1, 2, 0, 0]
    assert numbers.step.tolist() == [5, 19, 0, 0]
    assert numbers.seed.tolist() == [LAST_SEED, 3, 0, 0]
    assert numbers.image_index.tolist() == [0, 9, 0, 0]
    assert numbers.keeps.tolist() == [0, 1, 0, 0]
    for line, step in zip(numbers.after, steps[1:], strict=False):
        after = plan_of(step.params.plan).after
        assert after is not None
        np.testing.assert_array_equal(np.asarray(line), after[step.step])
    assert np.asarray(numbers.after)[2:].any() == 0


@KINDS
def test_raw_calls_are_marked(send: Send) -> None:
    raw = replace(params(1), plan=PlanKey(kind="denoise", timestep=7))
    steps = [STEPS[0], ImageStep(slot=2, params=raw, step=0)]
    numbers = step_numbers(send(words_of(step_block(steps, 4, plan_of, null_class=NULL_CLASS))))
    assert numbers.gives_log_variance.tolist() == [0, 1, 0, 0]
    assert numbers.row_timestep.tolist()[1] == 7


def test_the_block_is_sent_without_a_copy() -> None:
    block = step_block(STEPS, 8, plan_of, null_class=NULL_CLASS)
    words = words_of(block)
    assert words.dtype == np.int64
    assert (words.nbytes, words.flags.c_contiguous) == (block.nbytes, True)
