"""Chains: the plan of a sampler, or what is derived from one. Each is a longer or a shorter table, nothing else.

- A chain may begin with a given array: an image with noise added up to a timestep, or a latent taken as it is.
- It may go back to noisier steps, to adapt the pixels that are made to those that are kept (RePaint).
- It may go up, from an image to its latent (DDIM encoding).
- It may consist of one line that returns the network's output.

Kept pixels and jumps are the columns `SamplingPlan.after` of a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from diffusion.config import DiffusionConfig
from diffusion.plans import (
    AFTER_COLUMNS,
    KEPT_PLANS,
    PLAN_COLUMNS,
    SamplingPlan,
    alphas_cumprod,
    build_plan,
    ddim_encoding_plan,
    raw_plan,
)

ChainKind = Literal["sample", "encode", "denoise"]


class Resample(NamedTuple):
    """RePaint's jumps (Lugmayr et al. 2022, arXiv:2201.09865, Algorithm 1 and appendix B)."""

    times: int
    """How often each part of the chain is sampled, at least 1: the paper's r, `jump_n_sample` in its code."""
    jump: int
    """Sampling steps of such a part, at least 1: the paper's j, `jump_length` in its code."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Describes a chain of a given process; equal ones have the same plan."""

    kind: ChainKind = "sample"
    """sample: to an image. encode: from an image to a latent. denoise: one call, which returns the network's output."""
    sampler: str = "ancestral"
    """A name in `SAMPLERS`; for the kind `sample` only."""
    spec: str = ""
    """Respacing, see `diffusion.respacing.space_timesteps`."""
    eta: float = 0.0
    clip: bool = True
    strength: float | None = None
    """Part of the lines that are run, 0..1: begin with the given image, with noise added. 1: from noise alone."""
    timestep: int | None = None
    """Training timestep. sample: begin at the nearest kept one, with the given image and noise, or with the given
    latent. encode: end at the nearest kept one; None: at the noisiest. denoise: of the call; must be set."""
    from_latent: bool = False
    """Begin with the given array as it is: x at `timestep`, or at the noisiest kept one."""
    resample: Resample | None = None


def build_chain(diffusion: DiffusionConfig, chain: Chain) -> SamplingPlan:
    """Return the plan of a chain, from `KEPT_PLANS` if it was used lately. It is shared and read-only.

    Raises:
        ValueError: as `build_plan`; a strength, timestep or jump out of range; fields that exclude each other.
    """
    return KEPT_PLANS.get((diffusion, chain), lambda: _new_chain(diffusion, chain))


def _new_chain(diffusion: DiffusionConfig, chain: Chain) -> SamplingPlan:
    _check(diffusion, chain)
    if chain.kind == "denoise":
        assert chain.timestep is not None  # noqa: S101  # checked
        return raw_plan(diffusion, chain.timestep)
    if chain.kind == "encode":
        plan, end = _encoding(diffusion, chain)
        # The image is taken to be at the least noisy timestep, as in OpenAI's code: it is its own latent there
        return replace(_in_order(diffusion, plan, [*range(end)]), begin=(1.0, 0.0)) if end else _identity(plan)
    plan = build_plan(diffusion, chain.sampler, chain.spec, chain.eta, chain.clip)
    return _begun(diffusion, plan, chain)


def encoding_end(diffusion: DiffusionConfig, chain: Chain) -> int:
    """Return the training timestep of the latent that a chain of kind `encode` ends with."""
    plan, end = _encoding(diffusion, chain)
    return int(plan.timesteps[end])


def _encoding(diffusion: DiffusionConfig, chain: Chain) -> tuple[SamplingPlan, int]:
    """Return the plan that encodes to the noisiest timestep, and the line at whose timestep a chain ends."""
    plan = ddim_encoding_plan(diffusion, chain.spec, chain.clip)
    return plan, plan.num_steps - 1 if chain.timestep is None else nearest_line(plan, chain.timestep)


def nearest_line(plan: SamplingPlan, timestep: int) -> int:
    """Return the index of the line whose training timestep is nearest; of two, the noisier one."""
    distances = np.abs(plan.timesteps - timestep)
    nearest = np.flatnonzero(distances == distances.min())
    return int(nearest[np.argmax(plan.timesteps[nearest])])


def resampled_levels(num_steps: int, resample: Resample) -> list[int]:
    """Return the respaced step s of each network call of a chain with RePaint's jumps, from num_steps - 1 to 0.

    Where the list goes up, the chain jumps from s - 1 of the call before to the s of the next one. The calls are those
    of the schedule in appendix B of the paper: whenever the chain arrives at a multiple of the jump length, it jumps
    back by that length, `times - 1` times each.
    """
    left = dict.fromkeys(range(0, num_steps - resample.jump, resample.jump), resample.times - 1)
    levels: list[int] = []
    level = num_steps
    while level >= 1:
        level -= 1
        if left.get(level, 0) > 0:
            left[level] -= 1
            level += resample.jump
        levels.append(level)
    return levels


def resampled_calls(num_steps: int, resample: Resample) -> int:
    """Return the number of network calls of a chain with RePaint's jumps: the length of `resampled_levels`."""
    jumps = len(range(0, num_steps - resample.jump, resample.jump)) * (resample.times - 1)
    return num_steps + jumps * resample.jump


def _check(diffusion: DiffusionConfig, chain: Chain) -> None:
    if chain.strength is not None and not 0.0 <= chain.strength <= 1.0:
        raise ValueError(f"strength must be in 0..1; got {chain.strength}")
    if chain.timestep is not None and not 0 <= chain.timestep < diffusion.num_timesteps:
        raise ValueError(f"timestep must be in 0..{diffusion.num_timesteps - 1}; got {chain.timestep}")
    if chain.strength is not None and (chain.timestep is not None or chain.from_latent):
        raise ValueError("strength excludes a timestep and a latent: each says where the chain begins")
    if chain.kind == "denoise" and chain.timestep is None:
        raise ValueError("a chain of one network call needs the timestep of the call")
    if chain.kind != "sample" and (chain.strength is not None or chain.from_latent or chain.resample is not None):
        raise ValueError(f"strength, from_latent and resample are for sampling; the chain's kind is {chain.kind!r}")
    if chain.resample is not None and min(chain.resample) < 1:
        raise ValueError(f"resample's times and jump must be at least 1; got {[*chain.resample]}")


def _begun(diffusion: DiffusionConfig, plan: SamplingPlan, chain: Chain) -> SamplingPlan:
    """Return the plan from the line at which the chain begins, with its jumps."""
    if chain.strength in (None, 1.0) and chain.timestep is None and not chain.from_latent and chain.resample is None:
        return plan
    first, begin = 0, (0.0, 1.0)
    if chain.from_latent or chain.timestep is not None:
        first = 0 if chain.timestep is None else nearest_line(plan, chain.timestep)
    elif chain.strength is not None and chain.strength < 1.0:
        first = plan.num_steps - round(chain.strength * plan.num_steps)
        if first == plan.num_steps:
            return _identity(plan)
    if chain.from_latent:
        begin = (1.0, 0.0)
    elif chain.timestep is not None or chain.strength not in (None, 1.0):
        abar = alphas_cumprod(diffusion)[plan.timesteps[first]]
        begin = (float(np.sqrt(abar)), float(np.sqrt(1.0 - abar)))
    count = plan.num_steps - first
    levels = [*range(count - 1, -1, -1)] if chain.resample is None else resampled_levels(count, chain.resample)
    lines = [plan.num_steps - 1 - level for level in levels]
    return replace(_in_order(diffusion, plan, lines), begin=begin)


def _in_order(diffusion: DiffusionConfig, plan: SamplingPlan, lines: list[int]) -> SamplingPlan:
    """Return the plan that takes lines in this order; after a line that is not followed by the next one, it jumps."""
    order = np.array(lines, dtype=np.int64)
    table, after = plan.table[order], plan.after[order] if plan.after is not None else None
    starts = np.append(True, np.diff(order) != 1)
    if plan.fresh is not None:
        table = np.where(starts[:, None], plan.fresh[order], table)
    jumps = np.flatnonzero(starts[1:])
    if len(jumps):
        assert after is not None  # noqa: S101  # plans of samplers have it
        abar = alphas_cumprod(diffusion)[plan.timesteps]
        kept = abar[order[jumps + 1]] / abar[order[jumps] + 1]
        after[jumps, AFTER_COLUMNS.index("r_x")] = np.sqrt(kept)
        after[jumps, AFTER_COLUMNS.index("r_noise")] = np.sqrt(1.0 - kept)
    return _read_only(SamplingPlan(table, plan.timesteps[order], after=after))


def _identity(plan: SamplingPlan) -> SamplingPlan:
    """Return a plan of one line, at the least noisy timestep, which returns the given array."""
    nearest = int(plan.timesteps.argmin())
    line = np.zeros((1, len(PLAN_COLUMNS)), dtype=np.float32)
    line[0, PLAN_COLUMNS.index("t_model")] = plan.column("t_model")[nearest]
    line[0, PLAN_COLUMNS.index("c_xt")] = 1.0
    after = np.zeros((1, len(AFTER_COLUMNS)), dtype=np.float32)
    after[0, AFTER_COLUMNS.index("k_x0")] = 1.0
    return _read_only(SamplingPlan(line, plan.timesteps[[nearest]], after=after, begin=(1.0, 0.0)))


def _read_only(plan: SamplingPlan) -> SamplingPlan:
    for array in (plan.table, plan.timesteps, plan.after):
        if array is not None:
            array.setflags(write=False)
    return plan
