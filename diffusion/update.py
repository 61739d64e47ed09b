"""The update x_t -> x_prev that serves every sampler, a short loop over it, and images as 8-bit pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace, no_gradients, to_numpy
from diffusion.plans import PLAN_COLUMNS, SamplingPlan

Network = Callable[[A, A], A]
"""(x_t [B, C, H, W], what the network is told of the timestep, float32 [B]) -> raw output [B, C or 2C, H, W]."""
StepNoise: TypeAlias = "Callable[[int], A] | Sequence[A] | A"
"""The noise of sampling step k = 0, 1, ..., shaped like x_t: a function of k, or indexed by k."""
Gradient = Callable[[A, A], A]
"""(x_t, what the network is told, float32 [B]) -> the scaled classifier gradient, shaped like x_t."""


class PlanRows(NamedTuple, Generic[A]):
    """One line of a `SamplingPlan` per row of a batch, each column [B, 1, 1, 1]; the order is PLAN_COLUMNS'."""

    t_model: A
    a_x: A
    a_out: A
    clip: A
    c_x0: A
    c_xt: A
    c_prev: A
    lv_min: A
    lv_max: A
    noise_scale: A
    g_var: A
    g_const: A

    @classmethod
    def from_lines(cls, lines: A) -> Self:
        """Name the columns of gathered lines, float32 [B, 12]."""
        return cls(*namespace(lines).unstack(lines[:, :, None, None, None], axis=1))


assert PlanRows._fields == PLAN_COLUMNS  # noqa: S101  # from_lines relies on it


class Step(NamedTuple, Generic[A]):
    """What one sampling step gives."""

    x_prev: A
    """The less noisy images [B, C, H, W]."""
    x0: A
    """The images predicted from x_t, shaped like it, before any classifier guidance."""
    ok: A
    """bool [B]: False for rows that are not finite any more, whose x_prev is NaN; so is that of every later step.

    A network's output that overflowed counts, also where clipping would hide it, or where the plan does not read it.
    """


def split_output(output: A, channels: int) -> tuple[A, A]:
    """Split a network's output into its prediction and var_values (zeros where it has none), each [B, C, H, W]."""
    if output.shape[1] == channels:
        return output, namespace(output).zeros_like(output)
    return output[:, :channels], output[:, channels:]


@np.errstate(over="ignore", invalid="ignore")  # `ok` reports rows that stop being finite
def advance(plan: PlanRows[A], x_t: A, x0_prev: A, out: A, var_values: A, z: A, grad: A | None = None) -> Step[A]:
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
        grad: scaled gradient of log p(y | x_t), shaped like x_t; zeros for rows without classifier guidance; None where
            there is no other row.

    Returns:
        The next images, the x0 they came from, and which rows are finite.
    """
    return traceable_advance(plan, x_t, x0_prev, out, var_values, z, grad)


def traceable_advance(
    plan: PlanRows[A], x_t: A, x0_prev: A, out: A, var_values: A, z: A, grad: A | None = None
) -> Step[A]:
    """Take one step as `advance` does, in a form that torch.compile can trace: numpy may warn of overflows."""
    xp = namespace(out)
    unclipped = plan.a_x * x_t + plan.a_out * out
    x0 = xp.minimum(xp.maximum(unclipped, -plan.clip), plan.clip)
    # Not torch.lerp, whose vectorised loop and its remainder may round differently: a row would know its neighbours.
    log_variance = plan.lv_min + (plan.lv_max - plan.lv_min) / 2 * (var_values + 1)

    mean = plan.c_x0 * x0 + plan.c_xt * x_t + plan.c_prev * x0_prev
    if grad is not None:
        shift = (plan.g_var * xp.exp(log_variance) + plan.g_const) * grad
        mean = mean + xp.where(grad != 0, shift, 0.0)  # rows without know of no others, even where exp overflows
    noise = plan.noise_scale * xp.exp(0.5 * log_variance) * z
    x_prev = mean + xp.where(plan.noise_scale > 0, noise, 0.0)

    finite = xp.isfinite(unclipped) & xp.isfinite(var_values) & xp.isfinite(x_prev)
    ok = xp.all(finite, axis=(1, 2, 3))
    return Step(xp.where(xp.reshape(ok, (-1, 1, 1, 1)), x_prev, xp.nan), x0, ok)


def sample_loop(
    network: Network[A],
    plan: SamplingPlan,
    x_T: A,  # noqa: N803  # the papers' name
    noise: StepNoise[A],
    *,
    gradient: Gradient[A] | None = None,
    on_step: Callable[[int, Step[A]], None] | None = None,
) -> A:
    """Run one chain for a batch whose images all take the same plan: the reference that the engine must equal.

    For pictures that can be repeated, make x_T and the noise with `diffusion.noise.normal` (streams
    `STREAM_X_T` and `STREAM_STEP`) and run images one at a time. No gradients are recorded.

    Args:
        network: called once per step.
        plan: the chain.
        x_T: where it starts, standard normal [B, C, H, W].
        noise: what each step adds; not asked for where a step adds none.
        gradient: for classifier guidance, see `diffusion.classifier.classifier_gradient`.
        on_step: told the index of each step and what it gave, for progress and tests.

    Returns:
        The images, x_0 [B, C, H, W]; about in [-1, 1]; NaN for rows that stopped being finite (`Step.ok`).
    """
    xp = namespace(x_T)
    lines = xp.asarray(plan.table.copy(), device=x_T.device)
    batch, channels = x_T.shape[:2]
    zeros = xp.zeros_like(x_T)
    x, x0 = x_T, zeros
    for index in range(plan.num_steps):
        rows = PlanRows.from_lines(xp.broadcast_to(lines[index], (batch, len(PLAN_COLUMNS))))
        t_model = xp.full((batch,), float(plan.column("t_model")[index]), dtype=xp.float32, device=x_T.device)
        with no_gradients(x_T):
            out, var_values = split_output(network(x, t_model), channels)
            grad = None if gradient is None else gradient(x, t_model)
            adds_noise = bool(plan.column("noise_scale")[index] > 0)
            z = _noise_of(noise, index) if adds_noise else zeros
            step = advance(rows, x, x0, out, var_values, z, grad)
        x, x0 = step.x_prev, step.x0
        if on_step is not None:
            on_step(index, step)
    return x


def to_uint8(x: A) -> npt.NDArray[np.uint8]:
    """Turn images into 8-bit pixels as OpenAI's released scripts do: clamp and truncate, never round.

    Truncating in float32, a quarter of the levels that come straight from `from_uint8` go back one level lower.

    Args:
        x: [B, C, H, W] where data spans [-1, 1]; what lies outside is clamped, and NaN is black.

    Returns:
        uint8 [B, H, W, C].
    """
    levels = np.nan_to_num(((to_numpy(x) + 1) * 127.5).clip(0, 255), copy=False)  # NaN has no defined uint8
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))


def from_uint8(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Turn 8-bit pixels [B, H, W, C] into images v / 127.5 - 1, float32 [B, C, H, W]."""
    x = pixels.astype(np.float32) / np.float32(127.5) - 1
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _noise_of(noise: StepNoise[A], index: int) -> A:
    return noise(index) if callable(noise) else noise[index]
