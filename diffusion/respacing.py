"""Respacing: keep S of the T training timesteps (IDDPM section 4), and the shorter process that results."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.config import DiffusionConfig
from diffusion.quoting import quoted
from diffusion.schedules import Schedule, named_betas

IntArray = npt.NDArray[np.int64]

MIN_STEPS = 2
"""A process of one step has no posterior variance to clip to; OpenAI's code does not support it either."""


def space_timesteps(num_timesteps: int, spec: str) -> IntArray:
    """Choose the timesteps that a respaced process keeps, exactly as OpenAI's released code does.

    Args:
        num_timesteps: T of the training chain.
        spec: `"100"`: 100 timesteps, evenly spaced, both ends included (IDDPM section 4);
            `"10,10,20,40"`: the number of timesteps in each of four sections of equal length, the first section being
            the least noisy;
            `"ddim25"`: the smallest integer stride from 0 that gives exactly 25 timesteps
            (Song et al. 2021, arXiv:2010.02502); `""`: all timesteps.

    Returns:
        Ascending timesteps, int64 [S].

    Raises:
        ValueError: the spec cannot be parsed or met; the message names the part and the possible values.
    """
    if spec == "":
        return np.arange(num_timesteps, dtype=np.int64)
    if match := re.fullmatch(r"ddim([0-9]{1,9})", spec):
        return _integer_stride(num_timesteps, int(match.group(1)))
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", spec):
        raise ValueError(
            f'respacing must be a number of steps ("100"), numbers per section ("10,10,20,40"), "ddimN" or ""; '
            f"got {quoted(spec)}"
        )
    return _sections(num_timesteps, [int(count) for count in spec.split(",")])


def _integer_stride(num_timesteps: int, num_steps: int) -> IntArray:
    for stride in range(1, num_timesteps):
        if -(-num_timesteps // stride) == num_steps:
            return np.arange(0, num_timesteps, stride, dtype=np.int64)
    possible = sorted({-(-num_timesteps // stride) for stride in range(1, num_timesteps)})
    nearest = sorted(possible, key=lambda n: abs(n - num_steps))[:2]
    raise ValueError(
        f'respacing "ddim{num_steps}" is impossible: no integer stride through {num_timesteps} timesteps takes '
        f"{num_steps} steps; the nearest possible are {' and '.join(f'ddim{n}' for n in sorted(nearest))}"
    )


LEAST_LOG_SNR = 2 * -5.1
"""Where the timesteps of a multistep solver begin. Below it, x_t is noise alone: the cosine schedule goes on to -22,
and half of the steps would change nothing. DPM-Solver's authors end the cosine schedule there too, at time 0.9946 in
their released code; diffusers' `lambda_min_clipped`, -5.1 for this schedule, is half of it."""


def _sections(num_timesteps: int, counts: list[int]) -> IntArray:
    size, extra = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        length = size + (index < extra)
        if count > length:
            raise ValueError(
                f"respacing asks for {count} steps in section {index + 1} of {len(counts)}, which has only "
                f"{length} of the {num_timesteps} timesteps"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # accumulated and rounded half to even, as in OpenAI's code; i * stride would round differently
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += length
    return np.array(timesteps, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Process:
    """A diffusion process that can be sampled: its tables, and the network's timestep input at each step."""

    schedule: Schedule
    """Tables of the respaced process, S steps; betas, variance bounds and posterior are recomputed."""
    timestep_map: IntArray
    """int64 [S]: the training timestep of each respaced step, ascending."""
    t_model: npt.NDArray[np.float32]
    """float32 [S]: the network's timestep input at each respaced step (t, or t * 1000 / T)."""

    @property
    def num_steps(self) -> int:
        """S, the number of network calls of a full chain."""
        return self.schedule.num_steps


def respace(diffusion: DiffusionConfig, spec: str = "") -> Process:
    """Build the process that keeps the timesteps of a respacing spec.

    The betas are chosen so that alphas_cumprod keeps its values at the kept timesteps (IDDPM, Equation 19).

    Raises:
        ValueError: a spec that `space_timesteps` rejects, or one that keeps fewer than 2 steps.
    """
    return _keep(diffusion, space_timesteps(diffusion.num_timesteps, spec), spec)


def respace_by_log_snr(diffusion: DiffusionConfig, spec: str) -> Process:
    """Build the process of a multistep solver: for a number N, N timesteps about uniform in log(abar / (1 - abar)).

    The values go from the noisiest timestep's, but at least `LEAST_LOG_SNR`, to the least noisy one's, and are rounded
    to the nearest timesteps (Lu et al. 2022, arXiv:2206.00927, section 3.4, for the spacing). Where several are the
    same timestep, the next free ones are kept. Other specs are those of `respace`.

    Raises:
        ValueError: as `respace`.
    """
    kept = space_timesteps(diffusion.num_timesteps, spec)
    if re.fullmatch(r"[0-9]+", spec):
        abar = Schedule(named_betas(diffusion.noise_schedule, diffusion.num_timesteps)).alphas_cumprod
        log_snr = np.log(abar / (1.0 - abar))
        wanted = np.linspace(log_snr[0], max(log_snr[-1], LEAST_LOG_SNR), len(kept))
        after = np.clip(np.searchsorted(-log_snr, -wanted), 1, len(log_snr) - 1)  # log_snr falls
        is_before = np.abs(log_snr[after - 1] - wanted) <= np.abs(log_snr[after] - wanted)
        kept = _distinct(np.where(is_before, after - 1, after), len(log_snr))
    return _keep(diffusion, kept, spec)


def _distinct(timesteps: npt.NDArray[np.integer[Any]], num_timesteps: int) -> IntArray:
    """Move ascending timesteps as little as possible, so that each differs from the others; int64."""
    place = np.arange(len(timesteps))
    up = np.maximum.accumulate(timesteps - place) + place  # each at least one above the last
    most = num_timesteps - len(timesteps) + place
    return np.minimum(up, most).astype(np.int64)


def _keep(diffusion: DiffusionConfig, timestep_map: IntArray, spec: str) -> Process:
    if len(timestep_map) < MIN_STEPS:
        raise ValueError(f"respacing must keep at least {MIN_STEPS} steps; {quoted(spec)} keeps {len(timestep_map)}")
    return keep_timesteps(diffusion, timestep_map)


def keep_timesteps(diffusion: DiffusionConfig, timestep_map: IntArray) -> Process:
    """Build the process that keeps the given training timesteps, ascending int64 [S], at least two."""
    base = Schedule(named_betas(diffusion.noise_schedule, diffusion.num_timesteps))
    kept = base.alphas_cumprod[timestep_map]
    schedule = Schedule(1.0 - kept / np.append(1.0, kept[:-1]))
    t_model = timestep_map.astype(np.float32)
    if diffusion.rescale_timesteps:
        t_model = t_model * np.float32(1000.0 / diffusion.num_timesteps)
    return Process(schedule, timestep_map, t_model)
