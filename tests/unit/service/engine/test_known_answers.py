"""Chains whose results are known without a second sampler: inpainted Gaussian data, whole chains, empty ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffusion.chains import Chain, build_chain
from diffusion.config import CheckpointConfig, ModelConfig
from diffusion.plans import SAMPLERS
from diffusion.update import to_uint8
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GivenArrays, ImageParams, ImageResult
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from tests.fakes import generation, params
from tests.gaussian import KNOWN, PIXELS, GaussianDenoiser, distances, inpainting, kept_and_mask, plan_moments
from tests.given_images import DIFFUSION, PICTURES, output_of, with_chain
from tests.unit.service.engine.test_engine import CONFIG, SUBJECTS, Subject, reference, subject_of

samplers = pytest.mark.parametrize("sampler", SAMPLERS)
(PICTURE, *_) = PICTURES
MASKED_BESIDE = 8
"""Number of a chain that keeps pixels and jumps, see `tests.given_images`."""
ROWS = 8
SIZE = (12, 16 * PIXELS)


def results_of(engine: Engine, *images: ImageParams) -> list[ImageResult]:
    """Return the results of images that run together, in their order."""
    engine.add(generation("r", *images), submitted_at=0.0)
    results: list[ImageResult] = []
    while engine.has_work():
        results += engine.step()
    return sorted(results, key=lambda result: result.position)


def test_inpainted_images_of_the_engine_have_the_conditional_distribution() -> None:
    """8 images of 192 triples, 391 network calls; bounds as in `test_chains`, with four standard errors."""
    case = inpainting("ancestral", 40, 10, 1, variance="fixed_large")
    diffusion, chain = case
    model = ModelConfig(
        image_size=SIZE,
        image_channels=1,
        model_channels=32,
        channel_mult=(1,),
        attention_resolutions=(),
        learn_sigma=False,
    )
    config = EngineConfig(max_rows=ROWS)
    runner: ArrayRunner[Any] = ArrayRunner(GaussianDenoiser(CheckpointConfig(model=model, diffusion=diffusion)), config)
    runner.warm_up()
    known, mask = kept_and_mask((1, *SIZE))
    image = replace(
        params(seed=3),
        plan=chain,
        num_steps=build_chain(diffusion, chain).num_steps,
        class_index=None,
        given=GivenArrays(image=known, mask=mask),
        output="values",
    )
    images = [replace(image, image_index=k) for k in range(ROWS)]
    results = results_of(Engine({"m": runner}, config, Metrics()), *images)
    x = np.stack([result.values for result in results if result.values is not None])
    assert x.shape == (ROWS, 1, *SIZE)
    assert (x[..., ::PIXELS] == KNOWN).all()
    made = x.reshape(-1, PIXELS)[:, 1:].astype(np.float64)
    error = len(made) ** -0.5
    for (mean, deviation, correlation), errors in (
        (distances(*plan_moments(case)), 0.0),
        (distances(made.mean(0), np.cov(made.T)), 4 * error),
    ):
        assert np.abs(mean).max() < 0.14 + errors
        assert np.abs(deviation - 1).max() < 0.05 + errors / 2**0.5
        assert abs(correlation) < 0.02 + errors


@SUBJECTS
@samplers
def test_strength_one_and_a_mask_of_ones_are_plain_generation_bit_for_bit(sampler: str, subject: Subject) -> None:
    chain = Chain(sampler=sampler, spec="5")
    plain = replace(
        params(seed=3, cfg_scale=2.5, classifier_scale=3.0),
        plan=chain,
        num_steps=build_chain(DIFFUSION, chain).num_steps,
        output="values",
    )
    made = replace(PICTURE, mask=np.ones((1, 8, 8), dtype=np.float32))
    whole = replace(plain, plan=replace(chain, strength=1.0))
    same = [plain, replace(whole, given=PICTURE), replace(plain, given=made), replace(whole, given=made)]
    beside = [with_chain(params(seed=seed), MASKED_BESIDE, seed) for seed in range(2)]
    engine = Engine({"m": subject_of(subject)[0]}, CONFIG, Metrics())
    results = results_of(engine, *beside, *same)
    assert [output_of(result) for result in results[2:]] == [reference(plain, subject)] * 4
    assert [output_of(result) for result in results[:2]] == [reference(image, subject) for image in beside]


@SUBJECTS
@samplers
def test_strength_zero_returns_the_image_bit_for_bit(sampler: str, subject: Subject) -> None:
    chain = Chain(sampler=sampler, spec="5", strength=0.0)
    image = replace(params(seed=3, cfg_scale=2.5, classifier_scale=3.0), plan=chain, num_steps=1, given=PICTURE)
    beside = [with_chain(params(seed=seed), MASKED_BESIDE, seed) for seed in range(2)]
    engine = Engine({"m": subject_of(subject)[0]}, CONFIG, Metrics())
    pixels, values = results_of(engine, image, replace(image, output="values"), *beside)[:2]
    given = PICTURE.image
    assert given is not None
    assert output_of(values) == given.tobytes()
    assert output_of(pixels) == to_uint8(given[None])[0].tobytes()
