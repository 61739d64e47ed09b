"""Likelihoods: the variational bound of images in bits/dim, term by term, over the full chain or a respaced one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from diffusion.config import DiffusionConfig
from diffusion.losses import NATS_PER_BIT, LossTables, mean_flat, normal_kl, predict_x0, q_sample, vb_term_bpd
from diffusion.respacing import IntArray, Process, keep_timesteps, respace, space_timesteps
from diffusion.update import split_output

LabelledNetwork = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [B, C, H, W], the timestep input, float32 [B], labels int64 [B] or None) -> raw output; a `UNet`."""


class BoundTerms(NamedTuple):
    """One term of the bound per row, each [n]."""

    vb_bpd: Tensor
    """L_t in bits/dim; at t = 0 the decoder's negative log likelihood."""
    eps_mse: Tensor
    """Mean squared error of the eps that the predicted x0 implies."""
    x0_mse: Tensor
    """Mean squared error of the predicted x0."""


@dataclass(frozen=True, eq=False)
class VariationalBound:
    """The bound of a process: -log p(x0) <= the sum of L_t over its steps + the prior (IDDPM, Equations 4 to 7).

    The numbers are those of `calc_bpd_loop` in OpenAI's released code.
    """

    diffusion: DiffusionConfig
    process: Process
    """S steps; a step s is a row of its tables, `process.timestep_map[s]` its training timestep."""
    tables: LossTables
    t_model: Tensor
    """float32 [S]: the network's timestep input."""
    clip: bool = True
    """Whether the predicted x0 is clipped to [-1, 1], as in all published results."""

    @classmethod
    def of(
        cls, diffusion: DiffusionConfig, process: Process, device: torch.device | str = "cpu", *, clip: bool = True
    ) -> Self:
        """Compute the tables of a process and copy them to a device."""
        tables = LossTables.from_process(process, device)
        return cls(diffusion, process, tables, torch.from_numpy(process.t_model).to(device), clip)

    @torch.no_grad()
    def terms(self, network: LabelledNetwork, x0: Tensor, y: Tensor | None, s: Tensor, noise: Tensor) -> BoundTerms:
        """Compute one term per row; rows may be at different steps.

        Args:
            network: in eval mode.
            x0: 8-bit images as v / 127.5 - 1, [n, C, H, W].
            y: labels, int64 [n]; None for an unconditional network.
            s: steps of the process, int64 [n].
            noise: standard normal, shaped like x0.
        """
        tables = self.tables
        x_t = q_sample(tables, x0, s, noise)
        prediction, var_values = split_output(network(x_t, self.t_model[s], y), x0.shape[1])
        pred_x0 = predict_x0(tables, self.diffusion, prediction, x_t, s, clip=self.clip)
        vb_bpd = vb_term_bpd(tables, self.diffusion, pred_x0, var_values, x0, x_t, s)
        x0_scale, eps_scale = tables.sqrt_recip_alphas_cumprod[s], tables.sqrt_recipm1_alphas_cumprod[s]
        pred_eps = (x0_scale[:, None, None, None] * x_t - pred_x0) / eps_scale[:, None, None, None]
        return BoundTerms(vb_bpd, mean_flat((pred_eps - noise) ** 2), mean_flat((pred_x0 - x0) ** 2))

    def prior_bpd(self, x0: Tensor) -> Tensor:
        """Return KL(q(x_T | x_0) || N(0, 1)) in bits/dim [n]: the term that no network can change."""
        mean = self.tables.sqrt_alphas_cumprod[-1] * x0
        log_variance = float(np.log(1.0 - self.process.schedule.alphas_cumprod[-1]))
        zero = torch.zeros_like(x0)
        return mean_flat(normal_kl(mean, torch.full_like(x0, log_variance), zero, zero)) / NATS_PER_BIT


def likelihood_process(diffusion: DiffusionConfig, spec: str = "", *, extra_steps: bool = False) -> Process:
    """Build the process over which a likelihood is evaluated.

    Args:
        diffusion: the process that the network was trained for.
        spec: respacing, see `space_timesteps`; "" is the full chain.
        extra_steps: add every timestep below T/K to the K timesteps of spec (IDDPM, appendix E). A bound with
            large steps near t = 0 is loose; they roughly double the number of steps.

    Raises:
        ValueError: a spec that `respace` rejects.
    """
    process = respace(diffusion, spec)
    return keep_timesteps(diffusion, _with_extra_steps(diffusion, spec)) if extra_steps else process


def _with_extra_steps(diffusion: DiffusionConfig, spec: str) -> IntArray:
    strided = space_timesteps(diffusion.num_timesteps, spec)
    return np.union1d(strided, np.arange(diffusion.num_timesteps // len(strided), dtype=np.int64))
