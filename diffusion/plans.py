"""Sampling plans: a sampler for a process and a number of steps, as a table with one line per step.

Every sampler here is linear in the predicted x0, in x_t and in the previous x0. One update
(`diffusion.update.advance`) therefore serves all of them in one batch; each row reads its line of the table:

    x0     = clamp(a_x * x_t + a_out * out, -clip, clip)
    logvar = lv_min + (lv_max - lv_min) * (var_values + 1) / 2
    x_prev = c_x0 * x0 + c_xt * x_t + c_prev * x0_prev
             + (g_var * exp(logvar) + g_const) * grad
             + noise_scale * exp(logvar / 2) * z

`diffusion.chains` derives the plans of chains that begin with a given image, keep a part of it, or encode it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from diffusion.config import DiffusionConfig
from diffusion.plan_cache import PlanCache
from diffusion.respacing import Process, respace, respace_by_log_snr
from diffusion.schedules import FloatArray, Schedule, named_betas

PLAN_COLUMNS: Final = (
    "t_model",  # the network's timestep input
    "a_x",  # x0 from x_t ...
    "a_out",  # ... and from the network's output
    "clip",  # bound of x0: 1 or infinity
    "c_x0",
    "c_xt",
    "c_prev",  # of the previous step's x0: multistep solvers
    "lv_min",  # log variance where var_values is -1 ...
    "lv_max",  # ... and where it is 1
    "noise_scale",  # of exp(logvar / 2) * z
    "g_var",  # of exp(logvar) * grad: classifier guidance of ancestral sampling
    "g_const",  # of grad: classifier guidance of DDIM
)
"""The columns of `SamplingPlan.table`, in order."""

AFTER_COLUMNS: Final = (
    "k_x0",  # x_prev of kept pixels from the given image ...
    "k_noise",  # ... and from noise
    "r_x",  # RePaint's jump back to a noisier step, from x_prev ...
    "r_noise",  # ... and from noise; 0 where there is no jump
    "gives_log_variance",  # 1: the log variance takes the place of x0
)
"""The columns of `SamplingPlan.after`, in order: what may follow a line (`diffusion.update.finish_line`)."""

FloatTable = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """The coefficients of each step of a chain; computed in float64, stored in float32."""

    table: npt.NDArray[np.float32]
    """float32 [num_steps, 12] in sampling order: line 0 is the first and noisiest step. Read-only."""
    timesteps: npt.NDArray[np.int64]
    """int64 [num_steps]: the training timestep t of each line, 0..T-1."""
    fresh: FloatTable | None = None
    """float32 [num_steps, 12]: the lines to use where the previous line's x0 is missing, because a chain begins or
    arrives by a jump there. None: they are those of `table`, as for samplers that do not read the previous x0."""
    after: FloatTable | None = None
    """float32 [num_steps, 5]: see AFTER_COLUMNS. None: no line is followed by anything."""
    begin: tuple[float, float] = (0.0, 1.0)
    """(b_given, b_noise): the chain begins at b_given * given + b_noise * z, where z is the noise of x_T."""

    def __post_init__(self) -> None:
        if self.timesteps.dtype != np.int64 or self.timesteps.shape != self.table.shape[:1]:
            raise ValueError(
                f"timesteps must be int64 [{len(self.table)}]; got {self.timesteps.dtype} {self.timesteps.shape}"
            )
        if self.table.dtype != np.float32 or self.table.shape[1:] != (len(PLAN_COLUMNS),):
            raise ValueError(
                f"table must be float32 [num_steps, {len(PLAN_COLUMNS)}]; got {self.table.dtype} {self.table.shape}"
            )
        for name, columns in (("fresh", PLAN_COLUMNS), ("after", AFTER_COLUMNS)):
            table: FloatTable | None = getattr(self, name)
            expected = (len(self.table), len(columns))
            if table is not None and (table.dtype != np.float32 or table.shape != expected):
                raise ValueError(f"{name} must be float32 {[*expected]}; got {table.dtype} {table.shape}")

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        return sum(
            [array.nbytes for array in (self.table, self.timesteps, self.fresh, self.after) if array is not None]
        )

    @property
    def num_steps(self) -> int:
        """Number of network calls of the chain."""
        return len(self.table)

    def column(self, name: str) -> npt.NDArray[np.float32]:
        """Return one column, float32 [num_steps], by its name in `PLAN_COLUMNS`."""
        return self.table[:, PLAN_COLUMNS.index(name)]

    def after_column(self, name: str) -> FloatTable:
        """Return one column of `after`, float32 [num_steps], by its name in `AFTER_COLUMNS`; zeros without `after`."""
        if self.after is None:
            return np.zeros(self.num_steps, dtype=np.float32)
        return self.after[:, AFTER_COLUMNS.index(name)]


KEPT_PLANS: PlanCache[SamplingPlan] = PlanCache(max_bytes=64 << 20)
"""The process's plans and chains, for all models. A line takes 76 bytes, of a multistep solver 124."""


def build_plan(
    diffusion: DiffusionConfig,
    sampler: str = "ancestral",
    spec: str = "",
    eta: float = 0.0,
    clip: bool = True,
) -> SamplingPlan:
    """Return the plan of a sampler by name, from `KEPT_PLANS` if it was used lately. It is shared and read-only.

    Args:
        diffusion: the process the network was trained for.
        sampler: a name in `SAMPLERS`.
        spec: respacing, see `space_timesteps`; `"100"` takes 100 steps.
        eta: see `ddim_plan`; must be 0 for samplers that do not take it.
        clip: whether x0 is clamped to [-1, 1], as for all published samples.

    Raises:
        ValueError: an unknown sampler, a spec that cannot be met, eta out of range or given to a sampler without it.
    """
    key = (diffusion, sampler, spec, eta, clip)
    return KEPT_PLANS.get(key, lambda: _new_plan(diffusion, sampler, spec, eta, clip))


def _new_plan(diffusion: DiffusionConfig, sampler: str, spec: str, eta: float, clip: bool) -> SamplingPlan:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    entry = SAMPLERS[sampler]
    if eta != 0.0 and not entry.takes_eta:
        raise ValueError(f"eta must be 0 for sampler {sampler!r}, which does not use it; got {eta}")
    options = {"eta": eta} if entry.takes_eta else {}
    plan = entry.plan(diffusion, spec, clip=clip, **options)
    return replace(plan, after=_levels_after(diffusion, plan))


def alphas_cumprod(diffusion: DiffusionConfig) -> FloatArray:
    """Return abar of the training timesteps, float64 [T]."""
    return Schedule(named_betas(diffusion.noise_schedule, diffusion.num_timesteps)).alphas_cumprod


def _levels_after(diffusion: DiffusionConfig, plan: SamplingPlan) -> FloatTable:
    """Return the `after` of a sampler's plan: kept pixels are at the noise level at which each line ends."""
    abar_prev = np.append(alphas_cumprod(diffusion)[plan.timesteps[1:]], 1.0)
    after = np.zeros((plan.num_steps, len(AFTER_COLUMNS)), dtype=np.float32)
    after[:, AFTER_COLUMNS.index("k_x0")] = np.sqrt(abar_prev)
    after[:, AFTER_COLUMNS.index("k_noise")] = np.sqrt(1.0 - abar_prev)
    after[:, AFTER_COLUMNS.index("r_x")] = 1.0
    after.setflags(write=False)
    return after


def ancestral_plan(diffusion: DiffusionConfig, spec: str, clip: bool = True) -> SamplingPlan:
    """Plan ancestral sampling: draws of p(x_{t-1} | x_t), for which the model was trained.

    Ho et al. 2020 (arXiv:2006.11239, Algorithm 2) on the respaced process of IDDPM section 4. The last step adds
    no noise. Classifier guidance shifts the mean by the variance times the gradient (Dhariwal & Nichol 2021,
    arXiv:2105.05233, Algorithm 1).

    Args:
        diffusion: the process the network was trained for.
        spec: respacing, see `space_timesteps`.
        clip: whether x0 is clamped to [-1, 1].

    Raises:
        ValueError: a spec that cannot be met.
    """
    process = respace(diffusion, spec)
    schedule = process.schedule
    adds_noise = np.append(0.0, np.ones(process.num_steps - 1))
    lv_min, lv_max = _log_variance_bounds(diffusion, process)
    # OpenAI's fixed_small variance, which scales the gradient, is 0 at t = 0; its log variance is clipped there.
    g_var = adds_noise if diffusion.variance == "fixed_small" else np.ones(process.num_steps)
    return _plan(
        diffusion,
        process,
        clip,
        c_x0=schedule.posterior_mean_coef1,
        c_xt=schedule.posterior_mean_coef2,
        lv_min=lv_min,
        lv_max=lv_max,
        noise_scale=adds_noise,
        g_var=g_var,
    )


def ddim_plan(diffusion: DiffusionConfig, spec: str, eta: float, clip: bool = True) -> SamplingPlan:
    """Plan DDIM sampling (Song et al. 2021, arXiv:2010.02502, Equations 12 and 16).

    eps is recomputed from the clamped x0, as in OpenAI's released code. Classifier guidance shifts that eps by
    -sqrt(1 - abar) times the gradient (Dhariwal & Nichol 2021, arXiv:2105.05233, Algorithm 2); in terms of x0 this
    is a shift by (1 - abar) / sqrt(abar) times the gradient, which is not clamped again.

    Args:
        diffusion: the process the network was trained for; its kind of variance is not used.
        spec: respacing, see `space_timesteps`.
        eta: share of the posterior's noise to add, 0..1: 0 is deterministic, 1 adds as much noise as ancestral
            sampling with the fixed_small variance.
        clip: whether x0 is clamped to [-1, 1].

    Raises:
        ValueError: a spec that cannot be met, or eta out of range.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in 0..1 (0 is deterministic); got {eta}")
    process = respace(diffusion, spec)
    abar, abar_prev = process.schedule.alphas_cumprod, process.schedule.alphas_cumprod_prev
    sigma_squared = eta**2 * process.schedule.posterior_variance
    # The part of the variance 1 - abar_prev that eps gets; rounding must not make it negative.
    eps_scale = np.sqrt(np.maximum(1.0 - abar_prev - sigma_squared, 0.0))
    c_x0 = np.sqrt(abar_prev) - eps_scale / np.sqrt(1.0 / abar - 1.0)
    return _plan(
        diffusion,
        process,
        clip,
        c_x0=c_x0,
        c_xt=eps_scale / np.sqrt(1.0 - abar),
        noise_scale=np.sqrt(sigma_squared),
        g_const=c_x0 * (1.0 - abar) / np.sqrt(abar),
    )


def dpm_solver_plan(diffusion: DiffusionConfig, spec: str, clip: bool = True, *, adds_noise: bool) -> SamplingPlan:
    """Plan DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2), or its SDE form (appendix B there).

    The second order uses the previous x0. The first line is of first order, because it has none, and so is the last,
    which returns x0. Classifier guidance shifts x0 as for DDIM. The shift is of first order: the previous x0, which is
    stored without guidance, is taken to have the same one.

    Args:
        diffusion: the process the network was trained for; its kind of variance is not used.
        spec: `"20"`: 20 timesteps, about uniform in log-SNR, see `respace_by_log_snr`; any other respacing of
            `space_timesteps` as there.
        clip: whether x0 is clamped to [-1, 1].
        adds_noise: whether to plan the SDE form.

    Raises:
        ValueError: a spec that cannot be met.
    """
    process = respace_by_log_snr(diffusion, spec)
    abar, abar_prev = process.schedule.alphas_cumprod, process.schedule.alphas_cumprod_prev
    half_log_snr = 0.5 * np.log(abar / (1.0 - abar))  # lambda
    h = np.append(np.inf, -np.diff(half_log_snr))  # lambda grows by h in a step
    deviation = np.sqrt(1.0 - abar_prev)
    power = 2.0 if adds_noise else 1.0
    first_order = np.sqrt(abar_prev) * -np.expm1(-power * h)
    columns = {
        "c_xt": deviation / np.sqrt(1.0 - abar) * (np.exp(-h) if adds_noise else 1.0),
        "noise_scale": deviation * np.sqrt(-np.expm1(-2.0 * h)) if adds_noise else np.zeros_like(h),
        "g_const": first_order * (1.0 - abar) / np.sqrt(abar),
    }
    extrapolated = np.zeros_like(h)  # part of the difference of the last two x0 that is added
    extrapolated[1:-1] = h[1:-1] / (2.0 * h[2:])
    fresh = _plan(diffusion, process, clip, c_x0=first_order, **columns)
    plan = _plan(
        diffusion,
        process,
        clip,
        c_x0=first_order * (1.0 + extrapolated),
        c_prev=-first_order * extrapolated,
        **columns,
    )
    return replace(plan, fresh=fresh.table)


def ddim_encoding_plan(diffusion: DiffusionConfig, spec: str, clip: bool = True) -> SamplingPlan:
    """Plan the deterministic encoding of images: DDIM backwards (Song et al. 2021, arXiv:2010.02502, section 4.3).

    As in OpenAI's released code, timesteps go up and the image is taken to be x at the first one; the last line leads
    to eps itself, where abar is 0. Without that line, `ddim_plan` leads back.

    Args:
        diffusion: the process the network was trained for.
        spec: respacing, see `space_timesteps`.
        clip: whether x0 is clamped to [-1, 1].

    Raises:
        ValueError: a spec that cannot be met.
    """
    process = respace(diffusion, spec)
    abar = process.schedule.alphas_cumprod
    abar_next = np.append(abar[1:], 0.0)
    c_x0 = np.sqrt(abar_next) - np.sqrt(1.0 - abar_next) / np.sqrt(1.0 / abar - 1.0)
    plan = _plan(
        diffusion,
        process,
        clip,
        c_x0=c_x0,
        c_xt=np.sqrt((1.0 - abar_next) / (1.0 - abar)),
        g_const=c_x0 * (1.0 - abar) / np.sqrt(abar),
    )
    return SamplingPlan(plan.table[::-1], plan.timesteps[::-1])


def raw_plan(diffusion: DiffusionConfig, timestep: int) -> SamplingPlan:
    """Plan one network call at a training timestep: x_prev is the network's prediction, x0 its log variance.

    The log variance is that of the chain of all training timesteps.
    """
    process = respace(diffusion)
    lv_min, lv_max = _log_variance_bounds(diffusion, process)
    line = {
        "t_model": process.t_model[timestep],
        "a_out": 1.0,
        "clip": np.inf,
        "c_x0": 1.0,
        "lv_min": lv_min[timestep],
        "lv_max": lv_max[timestep],
    }
    table = np.array([[line.get(name, 0.0) for name in PLAN_COLUMNS]], dtype=np.float32)
    after = np.array([[float(name in ("r_x", "gives_log_variance")) for name in AFTER_COLUMNS]], dtype=np.float32)
    for array in (table, after):
        array.setflags(write=False)
    return SamplingPlan(table, process.timestep_map[[timestep]], after=after, begin=(1.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler that can be asked for by name."""

    plan: Callable[..., SamplingPlan]
    """Builds its plan from the process and the spec, and from the keywords clip and, if it takes that, eta."""
    takes_eta: bool = False
    """Whether it has the choice eta."""
    recommended_steps: tuple[int, int] = (50, 250)
    """The least and the most steps that make sense."""


SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(plan=ancestral_plan),
    "ddim": Sampler(plan=ddim_plan, takes_eta=True),
    "dpm++": Sampler(plan=partial(dpm_solver_plan, adds_noise=False), recommended_steps=(10, 25)),
    "sde-dpm++": Sampler(plan=partial(dpm_solver_plan, adds_noise=True), recommended_steps=(15, 50)),
}
"""By the name in requests. API, command line and page list what is here."""


def samplers_with_eta() -> list[str]:
    """Return the names of the samplers that have the choice eta."""
    return [name for name, sampler in SAMPLERS.items() if sampler.takes_eta]


def _log_variance_bounds(diffusion: DiffusionConfig, process: Process) -> tuple[FloatArray, FloatArray]:
    schedule = process.schedule
    small = schedule.posterior_log_variance_clipped
    if diffusion.variance == "learned_range":
        return small, np.log(schedule.betas)  # IDDPM, Equation 15
    if diffusion.variance == "learned":
        one = np.ones(process.num_steps)
        return -one, one  # the interpolation is the identity: var_values is the log variance
    fixed = small if diffusion.variance == "fixed_small" else np.log(schedule.fixed_large_variance)
    return fixed, fixed


def _plan(diffusion: DiffusionConfig, process: Process, clip: bool, **columns: FloatArray) -> SamplingPlan:
    """Add the columns that all samplers share, and 0 for absent ones; reverse ascending t into sampling order."""
    abar = process.schedule.alphas_cumprod
    predicts_eps = diffusion.prediction == "eps"
    values: dict[str, FloatArray | float] = {
        "t_model": process.t_model.astype(np.float64),
        "a_x": np.sqrt(1.0 / abar) if predicts_eps else 0.0,
        "a_out": -np.sqrt(1.0 / abar - 1.0) if predicts_eps else 1.0,
        "clip": 1.0 if clip else np.inf,
        **columns,
    }
    table = np.zeros((process.num_steps, len(PLAN_COLUMNS)), dtype=np.float64)
    for index, name in enumerate(PLAN_COLUMNS):
        table[:, index] = values.pop(name, 0.0)
    assert not values  # noqa: S101  # a misspelt column of our own
    stored, timesteps = table[::-1].astype(np.float32), process.timestep_map[::-1].copy()
    for array in (stored, timesteps):
        array.setflags(write=False)
    return SamplingPlan(stored, timesteps)
