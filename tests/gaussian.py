"""Gaussian data of three neighbouring pixels, whose denoiser is exact: what chains must return is known.

Images are rows of such triples, each independent of the others. Inpainting keeps the first pixel of each triple.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.chains import Chain, Resample, build_chain
from diffusion.config import CheckpointConfig, DiffusionConfig, Variance
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import AFTER_COLUMNS, PLAN_COLUMNS, SamplingPlan, alphas_cumprod
from tests.denoisers import ExactDenoiser

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

KNOWS_X0 = DiffusionConfig(num_timesteps=1000, prediction="x0", variance="fixed_small")
ABAR = alphas_cumprod(KNOWS_X0)
MEAN = np.array([0.1, -0.2, 0.05])
COVARIANCE = 0.09 * np.array([[1, 0.7, 0.5], [0.7, 1, 0.6], [0.5, 0.6, 1]])
PIXELS = len(MEAN)
KNOWN = 0.5
"""The first pixel, where it is kept; in float32, too."""
_SLOPE = COVARIANCE[1:, 0] / COVARIANCE[0, 0]
CONDITIONAL_MEAN = MEAN[1:] + _SLOPE * (KNOWN - MEAN[0])
"""Of the second and third pixels, given the first."""
CONDITIONAL_COVARIANCE = COVARIANCE[1:, 1:] - np.outer(_SLOPE, COVARIANCE[0, 1:])

GAINS = np.stack([a**0.5 * COVARIANCE @ np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(PIXELS)) for a in ABAR])
"""[T, 3, 3]: G of E[x0 | x_t] = mean + G (x_t - sqrt(abar) mean)."""


def exact_x0(x_t: Array, t: Array) -> Array:
    """Return E[x0 | x_t] of images [B, 1, H, 3 * n] at timesteps [B]."""
    timesteps = t.astype(np.int64)
    centred = x_t.reshape(len(x_t), -1, PIXELS) - ABAR[timesteps, None, None] ** 0.5 * MEAN
    x0 = MEAN + centred @ GAINS[timesteps].transpose(0, 2, 1)
    return x0.astype(np.float32).reshape(x_t.shape)


class GaussianDenoiser(ExactDenoiser):
    """The same for an engine."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__(config)
        self.description = self.network_id = "exact denoiser of Gaussian data"

    def embed_timesteps(self, t_model: Any) -> Any:
        return np.repeat(t_model[:, None], self.config.model.emb_channels, axis=1)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        self.calls.append(len(inputs.x_t))
        return exact_x0(inputs.x_t, inputs.emb_t[:, 0])


def kept_and_mask(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return given images with the known pixels, and the mask that keeps them."""
    mask = np.ones(shape, dtype=np.float32)
    mask[..., ::PIXELS] = 0
    return np.float32(KNOWN) * (1 - mask), mask


def inpainting(
    sampler: str, steps: int, times: int, jump: int, *, variance: Variance = "fixed_small"
) -> tuple[DiffusionConfig, Chain]:
    """Return a process, and a chain that makes pixels beside kept ones."""
    chain = Chain(sampler=sampler, spec=str(steps), clip=False, resample=Resample(times, jump))
    return KNOWS_X0.replace(variance=variance), chain


def moments(plan: SamplingPlan) -> tuple[Floats, Floats]:
    """Return mean [2] and covariance [2, 2] of the made pixels in closed form: each line is linear in x_t."""
    mean, covariance, made = np.zeros(PIXELS), np.eye(PIXELS), np.diag([0.0, 1.0, 1.0])
    known = np.array([KNOWN, 0, 0])
    for k, timestep in enumerate(plan.timesteps.tolist()):
        line = dict(zip(PLAN_COLUMNS, plan.table[k].tolist(), strict=True))
        after = dict(zip(AFTER_COLUMNS, (0, 0, 0, 0, 0) if plan.after is None else plan.after[k].tolist(), strict=True))
        step = line["c_x0"] * GAINS[timestep] + line["c_xt"] * np.eye(PIXELS)
        mean = step @ mean + line["c_x0"] * (MEAN - ABAR[timestep] ** 0.5 * GAINS[timestep] @ MEAN)
        covariance = step @ covariance @ step.T + line["noise_scale"] ** 2 * np.exp(line["lv_min"]) * np.eye(PIXELS)
        mean = made @ mean + after["k_x0"] * known
        covariance = made @ covariance @ made + np.diag([after["k_noise"] ** 2, 0, 0])
        if after["r_noise"] > 0:
            mean = after["r_x"] * mean
            covariance = after["r_x"] ** 2 * covariance + after["r_noise"] ** 2 * np.eye(PIXELS)
    return mean[1:], covariance[1:, 1:]


def plan_moments(case: tuple[DiffusionConfig, Chain]) -> tuple[Floats, Floats]:
    """Return the closed form of `inpainting`'s chain."""
    return moments(build_chain(*case))


def distances(mean: Floats, covariance: Floats) -> tuple[Floats, Floats, float]:
    """Compare moments with those of the conditional distribution.

    Returns:
        Per pixel, the error of the mean in conditional deviations and the ratio of the deviations; and the error of
        the correlation.
    """
    wanted = np.sqrt(np.diag(CONDITIONAL_COVARIANCE))
    found = np.sqrt(np.diag(covariance))
    correlation = covariance[0, 1] / found.prod() - CONDITIONAL_COVARIANCE[0, 1] / wanted.prod()
    return (mean - CONDITIONAL_MEAN) / wanted, found / wanted, float(correlation)
