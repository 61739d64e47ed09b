"""The update x_t -> x_prev that serves every sampler, a short loop over it, and images as 8-bit pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion.plans import PLAN_COLUMNS, SamplingPlan
from diffusion.unet import split_output

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], what the network is told of the timestep, float32 [B]) -> raw output [B, C or 2C, H, W]."""
StepNoise = Callable[[int], Tensor] | Sequence[Tensor] | Tensor
"""The noise of sampling step k = 0, 1, ..., shaped like x_t: a function of k, or indexed by k."""
Gradient = Callable[[Tensor, Tensor], Tensor]
"""(x_t, what the network is told, float32 [B]) -> the scaled classifier gradient, shaped like x_t."""


class PlanRows(NamedTuple):
    """One line of a `SamplingPlan` per row of a batch, each column [B, 1, 1, 1]; the order is PLAN_COLUMNS'."""

    t_model: Tensor
    a_x: Tensor
    a_out: Tensor
    clip: Tensor
    c_x0: Tensor
    c_xt: Tensor
    c_prev: Tensor
    lv_min: Tensor
    lv_max: Tensor
    noise_scale: Tensor
    g_var: Tensor
    g_const: Tensor

    @classmethod
    def from_lines(cls, lines: Tensor) -> Self:
        """Name the columns of gathered lines, float32 [B, 12]."""
        return cls(*lines[:, :, None, None, None].unbind(1))


assert PlanRows._fields == PLAN_COLUMNS  # noqa: S101  # from_lines relies on it


class Step(NamedTuple):
    """What one sampling step gives."""

    x_prev: Tensor
    """The less noisy images [B, C, H, W]."""
    x0: Tensor
    """The images predicted from x_t, shaped like it, before any classifier guidance."""
    ok: Tensor
    """bool [B]: False for rows that are not finite any more."""


def advance(
    plan: PlanRows,
    x_t: Tensor,
    x0_prev: Tensor,
    out: Tensor,
    var_values: Tensor,
    z: Tensor,
    grad: Tensor,
) -> Step:
    """Take one sampling step, x_t -> x_prev; every row may be at another step of another sampler.

    Samplers differ by the numbers of their plan only (`diffusion.plans` cites them). A row's result depends on
    its own arguments and on nothing else: no random state, no other row.

    Args:
        plan: one line per row.
        x_t: noisy images [B, C, H, W], in the units where data spans [-1, 1].
        x0_prev: x0 of the row's previous step, shaped like x_t; read by multistep solvers, must be finite.
        out: what the network predicts, eps or x0, shaped like x_t; guided already (`classifier_free`).
        var_values: the network's raw variance output, shaped like x_t; zeros where it has none.
        z: standard normal, shaped like x_t; not read where plan.noise_scale is 0.
        grad: scaled gradient of log p(y | x_t), shaped like x_t; zeros for rows without classifier guidance.

    Returns:
        The next images, the x0 they came from, and which rows are finite.
    """
    x0 = torch.clamp(plan.a_x * x_t + plan.a_out * out, -plan.clip, plan.clip)
    # Not torch.lerp, whose vectorised loop and its remainder may round differently: a row would know its neighbours.
    log_variance = plan.lv_min + (plan.lv_max - plan.lv_min) * ((var_values + 1) / 2)

    mean = plan.c_x0 * x0 + plan.c_xt * x_t + plan.c_prev * x0_prev
    mean = mean + (plan.g_var * log_variance.exp() + plan.g_const) * grad
    noise = plan.noise_scale * torch.exp(0.5 * log_variance) * z
    x_prev = mean + torch.where(plan.noise_scale > 0, noise, 0.0)

    return Step(x_prev, x0, x_prev.isfinite().flatten(1).all(dim=1))


def sample_loop(
    network: Network,
    plan: SamplingPlan,
    x_T: Tensor,  # noqa: N803  # the papers' name
    noise: StepNoise,
    *,
    gradient: Gradient | None = None,
    on_step: Callable[[int, Step], None] | None = None,
) -> Tensor:
    """Run one chain for a batch whose images all take the same plan: the reference that the engine must equal.

    For pictures that can be repeated, make x_T and the noise with `diffusion.noise_torch.normal` (streams
    `STREAM_X_T` and `STREAM_STEP`) and run images one at a time. No gradients are recorded.

    Args:
        network: called once per step.
        plan: the chain.
        x_T: where it starts, standard normal [B, C, H, W].
        noise: what each step adds; not asked for where a step adds none.
        gradient: for classifier guidance, see `classifier_gradient`.
        on_step: told the index of each step and what it gave, for progress and tests.

    Returns:
        The images, x_0 [B, C, H, W]; about in [-1, 1].
    """
    lines = torch.from_numpy(plan.table.copy()).to(x_T.device)
    batch, channels = x_T.shape[:2]
    zeros = torch.zeros_like(x_T)
    x, x0 = x_T, zeros
    for index in range(plan.num_steps):
        rows = PlanRows.from_lines(lines[index].expand(batch, -1))
        t_model = rows.t_model.flatten()
        with torch.no_grad():
            out, var_values = split_output(network(x, t_model), channels)
            grad = zeros if gradient is None else gradient(x, t_model)
            adds_noise = bool(plan.column("noise_scale")[index] > 0)
            z = _noise_of(noise, index) if adds_noise else zeros
            step = advance(rows, x, x0, out, var_values, z, grad)
        x, x0 = step.x_prev, step.x0
        if on_step is not None:
            on_step(index, step)
    return x


def to_uint8(x: Tensor) -> npt.NDArray[np.uint8]:
    """Turn images into 8-bit pixels as OpenAI's released scripts do: clamp and truncate, never round.

    Truncating in float32, a quarter of the levels that come straight from `from_uint8` go back one level lower.

    Args:
        x: [B, C, H, W] where data spans [-1, 1]; what lies outside is clamped.

    Returns:
        uint8 [B, H, W, C].
    """
    pixels = ((x.detach() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Turn 8-bit pixels [B, H, W, C] into images v / 127.5 - 1, float32 [B, C, H, W]."""
    x = torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1
    return x.permute(0, 3, 1, 2).contiguous()


def _noise_of(noise: StepNoise, index: int) -> Tensor:
    return noise(index) if callable(noise) else noise[index]
