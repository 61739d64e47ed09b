"""The update x_t -> x_prev of every sampler, a short loop over it, and conversion to and from 8-bit pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, namespace, no_gradients, to_numpy
from diffusion.plans import AFTER_COLUMNS, PLAN_COLUMNS, SamplingPlan

Network = Callable[[A, A], A]
"""(x_t [B, C, H, W], the timestep input, float32 [B]) -> raw output [B, C or 2C, H, W]."""
StepNoise: TypeAlias = "Callable[[int], A] | Sequence[A] | A"
"""The noise of sampling step k = 0, 1, ..., shaped like x_t: a function of k, or indexed by k."""
Gradient = Callable[[A, A], A]
"""(x_t, the timestep input, float32 [B]) -> the scaled classifier gradient, shaped like x_t."""


class PlanRows(NamedTuple, Generic[A]):
    """One line of a `SamplingPlan` per row of a batch, each column [B, 1, 1, 1], in the order of PLAN_COLUMNS."""

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
        """Split gathered lines, float32 [B, 12], into named columns."""
        return cls(*namespace(lines).unstack(lines[:, :, None, None, None], axis=1))


assert PlanRows._fields == PLAN_COLUMNS  # noqa: S101  # from_lines relies on it


class AfterRows(NamedTuple, Generic[A]):
    """What follows a line, one per row of a batch, each column [B, 1, 1, 1], in the order of AFTER_COLUMNS."""

    k_x0: A
    k_noise: A
    r_x: A
    r_noise: A
    gives_log_variance: A

    @classmethod
    def from_lines(cls, lines: A) -> Self:
        """Split gathered lines, float32 [B, 5], into named columns."""
        return cls(*namespace(lines).unstack(lines[:, :, None, None, None], axis=1))


assert AfterRows._fields == AFTER_COLUMNS  # noqa: S101  # from_lines relies on it


class Step(NamedTuple, Generic[A]):
    """The result of one sampling step."""

    x_prev: A
    """The less noisy images [B, C, H, W]."""
    x0: A
    """The images predicted from x_t, shaped like it, before classifier guidance."""
    ok: A
    """bool [B]: False for rows that are no longer finite; their x_prev is NaN, in this and every later step.

    A network output that overflowed makes a row False even if clipping would hide it, or the plan does not read it.
    """


def split_output(output: A, channels: int) -> tuple[A, A]:
    """Split a network's output into prediction and var_values (zeros if it has none), each [B, C, H, W]."""
    if output.shape[1] == channels:
        return output, namespace(output).zeros_like(output)
    return output[:, :channels], output[:, channels:]


@np.errstate(over="ignore", invalid="ignore")  # `ok` reports rows that stop being finite
def advance(plan: PlanRows[A], x_t: A, x0_prev: A, out: A, var_values: A, z: A, grad: A | None = None) -> Step[A]:
    """Take one sampling step, x_t -> x_prev; each row may be at a different step of a different sampler.

    Samplers differ only in the coefficients of their plan (`diffusion.plans` cites the papers). A row's result depends
    only on its own arguments: no random state, no other row.

    Args:
        plan: one line per row.
        x_t: noisy images [B, C, H, W], in the units where data spans [-1, 1].
        x0_prev: x0 of the row's previous step, shaped like x_t; read by multistep solvers, must be finite.
        out: the network's prediction, eps or x0, shaped like x_t, after classifier-free guidance (`classifier_free`).
        var_values: the network's raw variance output, shaped like x_t; zeros if the network has none.
        z: standard normal, shaped like x_t; not read where plan.noise_scale is 0.
        grad: scaled gradient of log p(y | x_t), shaped like x_t, zeros for rows without classifier guidance; None if
            no row has classifier guidance.

    Returns:
        The next images, the predicted x0, and whether each row is finite.
    """
    return traceable_advance(plan, x_t, x0_prev, out, var_values, z, grad)


def traceable_advance(
    plan: PlanRows[A], x_t: A, x0_prev: A, out: A, var_values: A, z: A, grad: A | None = None
) -> Step[A]:
    """Compute `advance` in a form that torch.compile can trace; numpy may warn of overflows."""
    xp = namespace(out)
    unclipped = plan.a_x * x_t + plan.a_out * out
    x0 = xp.minimum(xp.maximum(unclipped, -plan.clip), plan.clip)
    log_variance = interpolated_log_variance(plan, var_values)

    mean = plan.c_x0 * x0 + plan.c_xt * x_t + plan.c_prev * x0_prev
    if grad is not None:
        shift = (plan.g_var * xp.exp(log_variance) + plan.g_const) * grad
        mean = mean + xp.where(grad != 0, shift, 0.0)  # 0 for rows without guidance, even if exp overflows
    noise = plan.noise_scale * xp.exp(0.5 * log_variance) * z
    x_prev = mean + xp.where(plan.noise_scale > 0, noise, 0.0)

    finite = xp.isfinite(unclipped) & xp.isfinite(var_values) & xp.isfinite(x_prev)
    ok = xp.all(finite, axis=(1, 2, 3))
    return Step(xp.where(xp.reshape(ok, (-1, 1, 1, 1)), x_prev, xp.nan), x0, ok)


def interpolated_log_variance(plan: PlanRows[A], var_values: A) -> A:
    """Return the log variance of a step [B, C, H, W]: between the plan's bounds, where var_values are in -1..1."""
    # Not torch.lerp: its vectorised loop and its remainder round differently, so a row would depend on its position.
    return plan.lv_min + (plan.lv_max - plan.lv_min) / 2 * (var_values + 1)


def begun(begin: tuple[A | float, A | float], given: A, z: A) -> A:
    """Return where a chain begins, b_given * given + b_noise * z [B, C, H, W]; `SamplingPlan.begin` has the factors."""
    b_given, b_noise = begin
    return b_given * given + b_noise * z


def finish_line(after: AfterRows[A], x_prev: A, given: A, keep: A, z_kept: A, z_jump: A) -> A:
    """Return x_prev after what follows a line: kept pixels are put back, then noise is added up to a jump's timestep.

    Lugmayr et al. 2022 (arXiv:2201.09865, Algorithm 1). A row that keeps no pixel and does not jump stays as it is, bit
    for bit, and so does each pixel that is not kept.

    Args:
        after: one line per row.
        x_prev: the result of `advance` [B, C, H, W]; rows that are no longer finite stay so.
        given: the given images, shaped like x_prev; must be finite.
        keep: how much of each given pixel is kept, [B, 1 or C, H, W]: 1 - mask, 0 to 1.
        z_kept: standard normal, shaped like x_prev; not read where after.k_noise is 0.
        z_jump: standard normal, shaped like x_prev; not read where after.r_noise is 0.
    """
    xp = namespace(x_prev)
    kept = after.k_x0 * given + xp.where(after.k_noise > 0, after.k_noise * z_kept, 0.0)
    merged = xp.where(keep > 0, (1 - keep) * x_prev + keep * kept, x_prev)
    return xp.where(after.r_noise > 0, after.r_x * merged + after.r_noise * z_jump, merged)


def sample_loop(
    network: Network[A],
    plan: SamplingPlan,
    x_T: A,  # noqa: N803  # the papers' name
    noise: StepNoise[A],
    *,
    gradient: Gradient[A] | None = None,
    on_step: Callable[[int, Step[A]], None] | None = None,
    given: A | None = None,
    mask: A | None = None,
    kept_noise: StepNoise[A] | None = None,
    jump_noise: StepNoise[A] | None = None,
) -> A:
    """Run one chain for a batch of images that share a plan: the reference that the engine must match.

    For reproducible images, compute x_T and the noise with `diffusion.noise.normal` (streams `STREAM_X_T`,
    `STREAM_STEP`, `STREAM_KEPT` and `STREAM_JUMP`) and run images one at a time. No gradients are recorded.

    Args:
        network: called once per step.
        plan: the chain.
        x_T: start of the chain, standard normal [B, C, H, W].
        noise: the noise of each step; not read for steps that add none.
        gradient: for classifier guidance, see `diffusion.classifier.classifier_gradient`.
        on_step: called after each step with its index and its result, for progress and tests.
        given: images or latents [B, C, H, W], for plans that begin with them (`SamplingPlan.begin`) and for `mask`.
        mask: 1 where pixels are made, 0 where those of `given` are kept; [B, 1 or C, H, W].
        kept_noise: the noise of kept pixels, for `mask`.
        jump_noise: the noise of jumps, for plans that have some.

    Returns:
        The images x_0 [B, C, H, W], approximately in [-1, 1]; NaN for rows that stopped being finite (`Step.ok`). For
        a plan that encodes, the latent; for the plan of one network call, the prediction.

    Raises:
        ValueError: the plan or the mask needs an argument that is missing.
    """
    xp = namespace(x_T)
    if given is None and (plan.begin[0] != 0 or mask is not None):
        raise ValueError("given must be set: the plan begins with it, or a mask keeps some of it")
    if mask is not None and plan.after is None:
        raise ValueError("the plan does not say what follows its lines; build it with `build_plan` or `build_chain`")
    lines = xp.asarray(plan.table.copy(), device=x_T.device)
    batch, channels = x_T.shape[:2]
    zeros = xp.zeros_like(x_T)
    keep = zeros[:, :1] if mask is None else 1 - mask
    x, x0 = x_T, zeros
    if given is not None and plan.begin[0] != 0:
        x = begun(plan.begin, given, x_T)
    for index in range(plan.num_steps):
        rows = PlanRows.from_lines(xp.broadcast_to(lines[index], (batch, len(PLAN_COLUMNS))))
        t_model = xp.full((batch,), float(plan.column("t_model")[index]), dtype=xp.float32, device=x_T.device)
        with no_gradients(x_T):
            out, var_values = split_output(network(x, t_model), channels)
            grad = None if gradient is None else gradient(x, t_model)
            adds_noise = bool(plan.column("noise_scale")[index] > 0)
            z = _noise_of(noise, index) if adds_noise else zeros
            step = advance(rows, x, x0, out, var_values, z, grad)
            if plan.after_column("gives_log_variance")[index] > 0:
                step = step._replace(x0=interpolated_log_variance(rows, var_values))
            jumps = bool(plan.after_column("r_noise")[index] > 0)
            if plan.after is not None and (mask is not None or jumps):
                after = AfterRows.from_lines(xp.asarray(plan.after[[index]].copy(), device=x_T.device))
                kept_z = _noise_of(kept_noise, index) if plan.after_column("k_noise")[index] > 0 else zeros
                jump_z = _noise_of(jump_noise, index) if jumps else zeros
                known = zeros if given is None else given
                step = step._replace(x_prev=finish_line(after, step.x_prev, known, keep, kept_z, jump_z))
        x, x0 = step.x_prev, step.x0
        if on_step is not None:
            on_step(index, step)
    return x


def to_uint8(x: A) -> npt.NDArray[np.uint8]:
    """Convert images to 8-bit pixels as OpenAI's released scripts do: clamp and truncate, without rounding.

    Because float32 is truncated, a quarter of the levels converted by `from_uint8` come back one level lower.

    Args:
        x: [B, C, H, W] in the units where data spans [-1, 1]; values outside are clamped, and NaN becomes black.

    Returns:
        uint8 [B, H, W, C].
    """
    levels = np.nan_to_num(((to_numpy(x) + 1) * 127.5).clip(0, 255), copy=False)  # NaN has no defined uint8
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))


def from_uint8(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Convert 8-bit pixels [B, H, W, C] to images v / 127.5 - 1, float32 [B, C, H, W]."""
    x = pixels.astype(np.float32) / np.float32(127.5) - 1
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def from_uint8_reversibly(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Convert 8-bit pixels [B, H, W, C] to images that `to_uint8` converts back to the same pixels, [B, C, H, W].

    They are those of `from_uint8`, or larger by the least that is needed: at most 1e-7.
    """
    return np.ascontiguousarray(_reversible_levels()[pixels].transpose(0, 3, 1, 2))


@lru_cache(maxsize=1)
def _reversible_levels() -> npt.NDArray[np.float32]:
    values = np.arange(256, dtype=np.uint8)
    levels = from_uint8(values[:, None, None, None])
    while (low := to_uint8(levels).ravel() < values).any():
        levels[low] = np.nextafter(levels[low], np.float32(2))
    return levels.ravel()


def _noise_of(noise: StepNoise[A] | None, index: int) -> A:
    if noise is None:
        raise ValueError(f"line {index} of the plan needs noise that is missing: kept_noise or jump_noise")
    return noise(index) if callable(noise) else noise[index]
