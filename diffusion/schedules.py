"""Noise schedules: betas, and the tables of q(x_t | x_0) and q(x_{t-1} | x_t, x_0) that follow from them.

All tables are float64 and indexed by timesteps 0..T-1, where 0 is the least noisy (papers count 1..T).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

COSINE_OFFSET = 0.008
"""s in IDDPM's Equation 17, which prevents the first betas from being too small."""

MAX_BETA = 0.999
"""Upper limit of betas (IDDPM section 3.2), which prevents singularities at the end of the chain."""


def named_betas(noise_schedule: str, num_timesteps: int) -> FloatArray:
    """Return the betas of a named schedule.

    Args:
        noise_schedule: `linear` (Ho et al. 2020, arXiv:2006.11239, section 4, rescaled by 1000 / T so that
            alphas_cumprod keeps its shape, IDDPM appendix A) or `cosine` (IDDPM, Equation 17).
        num_timesteps: T, at least 2.

    Returns:
        float64 [T]; betas[0] belongs to the least noisy timestep.

    Raises:
        ValueError: unknown name, or fewer than 2 timesteps.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2; got {num_timesteps}")
    if noise_schedule == "linear":
        return np.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps, dtype=np.float64)
    if noise_schedule == "cosine":
        u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        f = np.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], MAX_BETA)
    raise ValueError(f"noise_schedule must be 'linear' or 'cosine'; got {noise_schedule!r}")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of a diffusion process, derived from its betas. Immutable; every table is float64 [S]."""

    betas: FloatArray
    """float64 [S], each in (0, 1]; S is at least 2."""

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or len(self.betas) < 2:
            raise ValueError(f"betas must be a vector of at least 2 steps; got shape {self.betas.shape}")
        if not ((self.betas > 0) & (self.betas <= 1)).all():
            raise ValueError("betas must lie in (0, 1]")

    @property
    def num_steps(self) -> int:
        """Steps of this process: T, or S after respacing."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> FloatArray:
        """abar_t, the remaining signal at t (Ho et al. 2020, section 2)."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> FloatArray:
        """abar_{t-1}; 1 for t = 0."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> FloatArray:
        """beta-tilde_t (IDDPM, Equation 10); 0 for t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> FloatArray:
        """Log of beta-tilde_t, with entry 0 (minus infinity) replaced by entry 1."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def fixed_large_variance(self) -> FloatArray:
        """beta_t, with entry 0 replaced by beta-tilde_1: OpenAI's fixed_large, for a better likelihood at t = 0."""
        return np.append(self.posterior_variance[1], self.betas[1:])

    @cached_property
    def posterior_mean_coef1(self) -> FloatArray:
        """Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (IDDPM, Equation 11)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> FloatArray:
        """Factor of x_t in the mean of q(x_{t-1} | x_t, x_0) (IDDPM, Equation 11)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)
