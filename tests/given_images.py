"""Images that begin with a given array, keep a part of it, encode it or are one raw call: drawn, and sampled alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from diffusion.arrays import to_numpy
from diffusion.chains import Chain, Resample, build_chain
from diffusion.config import CheckpointConfig, DiffusionConfig
from diffusion.sampling import ClassGradient, ClassNetwork, ImageSpec, sample_values
from diffusion.update import Step, from_uint8_reversibly, to_uint8
from service.engine.request import GivenArrays, ImageParams, ImageResult

DIFFUSION = DiffusionConfig(num_timesteps=1000)
"""Of `tests.fakes.tiny_config`."""


def given_arrays(seed: int, shape: tuple[int, int, int] = (1, 8, 8), *, masked: bool) -> GivenArrays:
    """Return a picture [C, H, W] of 8-bit pixels, with a mask or without."""
    channels, height, width = shape
    rng = np.random.default_rng(seed)
    image = from_uint8_reversibly(rng.integers(0, 256, (1, height, width, channels), dtype=np.uint8))[0]
    mask = rng.choice(np.array([0, 0.5, 1], dtype=np.float32), (1, height, width))
    return GivenArrays(image=image, mask=mask if masked else None)


PICTURES = [given_arrays(seed, masked=False) for seed in range(2)]
MASKED = [given_arrays(seed, masked=True) for seed in range(2)]

CHAINS: list[tuple[Chain, list[GivenArrays] | None]] = [
    (Chain(sampler="dpm++", spec="5"), None),
    (Chain(sampler="sde-dpm++", spec="5"), None),
    (Chain(sampler="ancestral", spec="6", strength=0.5), PICTURES),
    (Chain(sampler="dpm++", spec="6", timestep=500), PICTURES),
    (Chain(sampler="ddim", spec="4", from_latent=True), PICTURES),
    (Chain(sampler="ancestral", spec="4", strength=0.0), PICTURES),
    (Chain(sampler="ancestral", spec="4"), MASKED),
    (Chain(sampler="dpm++", spec="5", strength=0.8), MASKED),
    (Chain(sampler="ddim", spec="4", eta=0.5, resample=Resample(2, 2)), MASKED),
    (Chain(sampler="sde-dpm++", spec="4", clip=False, resample=Resample(2, 1)), None),
    (Chain(kind="encode", spec="5"), PICTURES),
    (Chain(kind="denoise", timestep=700), PICTURES),
]


def with_chain(
    image: ImageParams,
    number: int,
    given: int = 0,
    *,
    as_values: bool = False,
    config: CheckpointConfig | None = None,
) -> ImageParams:
    """Replace an image's plan by one of `CHAINS`, with its given arrays; of `tiny_config`, or of another model."""
    chain, arrays = CHAINS[number]
    if arrays is not None and config is not None:
        arrays = [given_arrays(seed, config.model.image_shape, masked=arrays is MASKED) for seed in range(2)]
    return replace(
        image,
        plan=chain,
        num_steps=build_chain(DIFFUSION if config is None else config.diffusion, chain).num_steps,
        given=None if arrays is None else arrays[given],
        output="values" if as_values or chain.kind != "sample" else "pixels",
        # One raw call is what it is
        classifier_scale=0.0 if chain.kind == "denoise" else image.classifier_scale,
    )


@st.composite
def with_any_chain(draw: st.DrawFn, images: st.SearchStrategy[ImageParams]) -> ImageParams:
    """Draw an image; for one in three, replace its plan by one of `CHAINS`."""
    image = draw(images)
    if draw(st.integers(0, 2)):
        return image
    number = draw(st.integers(0, len(CHAINS) - 1))
    # Few different images: each is also sampled alone
    fewer = replace(image, seed=image.seed % 2, image_index=number % 2)
    return with_chain(fewer, number, given=fewer.seed, as_values=bool(fewer.seed))


def sampled_alone(
    image: ImageParams,
    network: ClassNetwork,
    gradient: ClassGradient | None = None,
    *,
    xp: Any = np,
    diffusion: DiffusionConfig = DIFFUSION,
) -> bytes:
    """Sample one image without any engine; return the bytes of its pixels or values."""
    plan = build_chain(diffusion, image.plan)
    spec = ImageSpec(
        seed=image.seed,
        image_index=image.image_index,
        class_index=image.class_index,
        cfg_scale=image.cfg_scale,
        classifier_scale=image.classifier_scale,
        given=None if image.given is None else image.given.image,
        cond=None if image.given is None else image.given.cond,
        mask=None if image.given is None else image.given.mask,
    )
    last: list[Any] = []

    def keep(_: int, step: Step[Any]) -> None:
        last[:] = [step]

    x = sample_values(network, plan, [spec], keep, gradient=gradient if spec.classifier_scale else None, xp=xp)
    if image.output == "pixels":
        return to_uint8(x)[0].tobytes()
    values = to_numpy(x)[0]
    if image.plan.kind == "denoise":
        values = np.concatenate([values, to_numpy(last[0].x0)[0]])
    return values.tobytes()


def output_of(result: ImageResult) -> bytes:
    """Return the bytes of a result's pixels or values."""
    output = result.pixels if result.values is None else result.values
    assert output is not None
    return output.tobytes()
