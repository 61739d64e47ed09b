"""DPM-Solver++(2M) and its SDE form, step by step, against diffusers' scheduler on the same betas and timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from diffusion.config import DiffusionConfig
from diffusion.plans import SamplingPlan, build_plan
from diffusion.schedules import Schedule, named_betas
from diffusion.update import PlanRows, Step, advance, sample_loop

PROCESSES = {
    "cosine": DiffusionConfig(num_timesteps=1000),
    "linear": DiffusionConfig(num_timesteps=1000, noise_schedule="linear"),
    "cosine, x0": DiffusionConfig(num_timesteps=1000, prediction="x0"),
    "linear, x0": DiffusionConfig(num_timesteps=1000, noise_schedule="linear", prediction="x0"),
}
ALGORITHMS = {"dpm++": "dpmsolver++", "sde-dpm++": "sde-dpmsolver++"}


def _scheduler(diffusion: DiffusionConfig, plan: SamplingPlan, sampler: str) -> DPMSolverMultistepScheduler:
    schedule = Schedule(named_betas(diffusion.noise_schedule, diffusion.num_timesteps))
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        trained_betas=schedule.betas,
        algorithm_type=ALGORITHMS[sampler],
        solver_order=2,
        solver_type="midpoint",
        prediction_type="epsilon" if diffusion.prediction == "eps" else "sample",
    )
    # It computes both of these in float32, in which little is left of the distance of neighbouring timesteps
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    scheduler.set_timesteps(timesteps=plan.timesteps.tolist())
    abar = schedule.alphas_cumprod[plan.timesteps]
    scheduler.sigmas = torch.from_numpy(np.append(np.sqrt((1 - abar) / abar), 0.0))
    return scheduler


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
"""Of the library, which passes a tensor to numpy."""


@pytest.mark.parametrize("spec", ["10", "25", "3", "ddim20", "5,10"])
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("sampler", ALGORITHMS)
def test_every_step_equals_the_library_s(sampler: str, name: str, spec: str) -> None:
    diffusion = PROCESSES[name]
    plan = build_plan(diffusion, sampler, spec, clip=False)
    scheduler = _scheduler(diffusion, plan, sampler)
    assert scheduler.timesteps.tolist() == plan.timesteps.tolist()

    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(2, 3, 4, 4, generator=generator)
    x0_prev = torch.zeros_like(x_t)
    lines = torch.from_numpy(plan.table.copy())
    for index, t in enumerate(scheduler.timesteps):
        abar = float(scheduler.alphas_cumprod[t])
        x0, z = torch.randn(2, 2, 3, 4, 4, generator=generator).clamp(-1, 1)
        # What a network would say that finds this x0: eps is otherwise unbounded in x0 at the noisiest steps
        out = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5 if diffusion.prediction == "eps" else x0
        theirs = scheduler.step(out, t, x_t, variance_noise=z).prev_sample
        step = advance(PlanRows.from_lines(lines[[index]]), x_t, x0_prev, out, torch.zeros_like(x_t), z)
        # Both compute x0 from eps in float32, which multiplies its rounding by a_x
        a_x, a_x_before = (float(plan.column("a_x")[k]) for k in (index, max(index - 1, 0)))
        c_x0, c_prev = (abs(float(plan.column(name)[index])) for name in ("c_x0", "c_prev"))
        tolerance = 1e-6 * (float(theirs.abs().max()) + c_x0 * a_x + c_prev * a_x_before)
        torch.testing.assert_close(step.x_prev.double(), theirs.double(), rtol=0, atol=tolerance)
        x_t, x0_prev = theirs, step.x0


@pytest.mark.parametrize("sampler", ALGORITHMS)
def test_a_chain_equals_the_library_s(sampler: str) -> None:
    diffusion = PROCESSES["linear"]
    plan = build_plan(diffusion, sampler, "15", clip=False)
    scheduler = _scheduler(diffusion, plan, sampler)
    z = torch.randn(16, 2, 1, 4, 4, generator=torch.Generator().manual_seed(4))

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x_t.roll(1, 3) - x_t / 2) + t[:, None, None, None] / 1000

    x = z[15]
    seen: list[Step[Any]] = []
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t.float()[None]), t, x, variance_noise=z[index]).prev_sample
    ours = sample_loop(network, plan, z[15], z, on_step=lambda _, step: seen.append(step))
    assert len(seen) == plan.num_steps == 15
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4 * float(x.abs().max()))
    np.testing.assert_array_equal(seen[-1].x0, ours)  # the last line returns x0
