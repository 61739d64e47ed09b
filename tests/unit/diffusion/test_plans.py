from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.config import DiffusionConfig
from diffusion.plans import (
    PLAN_COLUMNS,
    SamplingPlan,
    alphas_cumprod,
    ancestral_plan,
    build_plan,
    ddim_plan,
    dpm_solver_plan,
)
from diffusion.respacing import LEAST_LOG_SNR, respace, respace_by_log_snr, space_timesteps

FloatArray = npt.NDArray[np.float64]

COSINE = DiffusionConfig()
LINEAR = DiffusionConfig(num_timesteps=1000, noise_schedule="linear", rescale_timesteps=True)
KNOWS_X0 = DiffusionConfig(prediction="x0", variance="fixed_small")

diffusions = st.builds(
    DiffusionConfig,
    num_timesteps=st.sampled_from([250, 1000, 4000]),
    noise_schedule=st.sampled_from(["linear", "cosine"]),
    variance=st.sampled_from(["learned_range", "learned", "fixed_small", "fixed_large"]),
    prediction=st.sampled_from(["eps", "x0"]),
    rescale_timesteps=st.booleans(),
)
steps = st.integers(2, 250)
etas = st.floats(0.0, 1.0)


def _wide(plan: SamplingPlan, name: str) -> FloatArray:
    return plan.column(name).astype(np.float64)


def _abar(diffusion: DiffusionConfig, spec: str) -> tuple[FloatArray, FloatArray]:
    """Return alphas_cumprod and alphas_cumprod_prev, in the order of sampling."""
    schedule = respace(diffusion, spec).schedule
    return schedule.alphas_cumprod[::-1], schedule.alphas_cumprod_prev[::-1]


@given(diffusions, steps, etas, st.booleans())
def test_plans_are_read_only_float32_tables_of_numbers(
    diffusion: DiffusionConfig, num_steps: int, eta: float, clip: bool
) -> None:
    for plan in (
        ancestral_plan(diffusion, str(num_steps), clip),
        ddim_plan(diffusion, str(num_steps), eta, clip),
    ):
        assert plan.table.shape == (num_steps, len(PLAN_COLUMNS)) == (plan.num_steps, 12)
        assert plan.table.dtype == np.float32
        assert not plan.table.flags.writeable
        assert (plan.column("clip") == (1.0 if clip else np.inf)).all()
        assert np.isfinite(np.delete(plan.table, PLAN_COLUMNS.index("clip"), axis=1)).all()


@given(diffusions, steps)
def test_plans_start_at_the_noisiest_step(diffusion: DiffusionConfig, num_steps: int) -> None:
    timesteps = ancestral_plan(diffusion, str(num_steps)).column("t_model")
    np.testing.assert_array_equal(timesteps, respace(diffusion, str(num_steps)).t_model[::-1])
    assert (np.diff(timesteps) < 0).all()


@given(diffusions, steps, etas)
def test_the_last_step_adds_no_noise_and_returns_x0(diffusion: DiffusionConfig, num_steps: int, eta: float) -> None:
    for plan in (ancestral_plan(diffusion, str(num_steps)), ddim_plan(diffusion, str(num_steps), eta)):
        last = dict(zip(PLAN_COLUMNS, plan.table[-1].tolist(), strict=True))
        assert last["noise_scale"] == 0
        assert last["c_x0"] == pytest.approx(1, abs=1e-6)
        assert last["c_xt"] == pytest.approx(0, abs=1e-6)


@given(diffusions, steps)
def test_ancestral_sampling_adds_noise_at_all_other_steps(diffusion: DiffusionConfig, num_steps: int) -> None:
    assert (ancestral_plan(diffusion, str(num_steps)).column("noise_scale")[:-1] == 1).all()


@given(diffusions, steps)
def test_ddim_without_eta_adds_none_at_all(diffusion: DiffusionConfig, num_steps: int) -> None:
    assert (ddim_plan(diffusion, str(num_steps), 0.0).column("noise_scale") == 0).all()


@given(diffusions, steps)
def test_the_prediction_becomes_x0(diffusion: DiffusionConfig, num_steps: int) -> None:
    plan = ancestral_plan(diffusion, str(num_steps))
    abar, _ = _abar(diffusion, str(num_steps))
    x0, eps = 0.3, -1.2
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    out = eps if diffusion.prediction == "eps" else x0

    # float32 coefficients of up to 1e4 cancel at the noisiest steps: the error is relative to them
    tolerance = 1e-6 * (1 + np.abs(_wide(plan, "a_x")))
    assert (np.abs(_wide(plan, "a_x") * x_t + _wide(plan, "a_out") * out - x0) < tolerance).all()


@given(diffusions, steps, etas)
def test_a_step_leads_from_one_noise_level_to_the_next(diffusion: DiffusionConfig, num_steps: int, eta: float) -> None:
    # With the true x0, x_prev must be distributed as q(x_{t-1} | x_0): the defining property of both samplers (Song et
    # al. 2021, lemma 1). The variance is that of the posterior.
    abar, abar_prev = _abar(diffusion, str(num_steps))
    posterior = diffusion.replace(variance="fixed_small")
    for plan in (ancestral_plan(posterior, str(num_steps)), ddim_plan(diffusion, str(num_steps), eta)):
        c_x0, c_xt = _wide(plan, "c_x0"), _wide(plan, "c_xt")
        noise_variance = _wide(plan, "noise_scale") ** 2 * np.exp(_wide(plan, "lv_min"))
        np.testing.assert_allclose(c_x0 + c_xt * np.sqrt(abar), np.sqrt(abar_prev), atol=2e-6)
        np.testing.assert_allclose(c_xt**2 * (1 - abar) + noise_variance, 1 - abar_prev, atol=2e-6)


@given(diffusions, steps)
def test_ddim_with_eta_one_is_ancestral_sampling_with_the_posterior_variance(
    diffusion: DiffusionConfig, num_steps: int
) -> None:
    ancestral = ancestral_plan(diffusion.replace(variance="fixed_small"), str(num_steps))
    ddim = ddim_plan(diffusion, str(num_steps), 1.0)

    for name in ("t_model", "a_x", "a_out", "c_x0", "c_xt"):
        np.testing.assert_allclose(ddim.column(name), ancestral.column(name), rtol=1e-5, atol=1e-6)
    deviation = _wide(ancestral, "noise_scale") * np.exp(_wide(ancestral, "lv_min") / 2)
    np.testing.assert_allclose(ddim.column("noise_scale"), deviation, rtol=1e-5, atol=1e-7)


def _final_distribution(plan: SamplingPlan, mean: float, deviation: float) -> tuple[float, float]:
    """Sample N(mean, deviation^2) with its exact denoiser, in closed form: the update is linear in x_t."""
    abar, _ = _abar(KNOWS_X0, str(plan.num_steps))
    at, spread = 0.0, 1.0  # of x_t
    for k in range(plan.num_steps):
        line = dict(zip(PLAN_COLUMNS, plan.table[k].tolist(), strict=True))
        gain = deviation**2 * np.sqrt(abar[k]) / (deviation**2 * abar[k] + 1 - abar[k])
        offset = mean - gain * np.sqrt(abar[k]) * mean  # E[x0 | x_t] = offset + gain * x_t
        factor = line["c_x0"] * gain + line["c_xt"]
        at = line["c_x0"] * offset + factor * at
        spread = factor**2 * spread + line["noise_scale"] ** 2 * np.exp(line["lv_min"])
    return at, float(np.sqrt(spread))


@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize(("mean", "deviation"), [(0.4, 0.3), (-0.2, 1.0), (0.0, 0.05)])
def test_samplers_converge_to_the_data_distribution(eta: float | None, mean: float, deviation: float) -> None:
    errors: list[float] = []
    for spec in ("50", "250", "1000"):
        plan = ancestral_plan(KNOWS_X0, spec) if eta is None else ddim_plan(KNOWS_X0, spec, eta)
        at, spread = _final_distribution(plan, mean, deviation)
        assert at == pytest.approx(mean, abs=1e-3)
        errors.append(abs(spread - deviation))

    assert errors[0] < 0.05
    assert errors[2] < 3e-3
    assert errors == sorted(errors, reverse=True) or max(errors) < 1e-3


@pytest.mark.parametrize("adds_noise", [False, True])
@given(diffusions, st.one_of(steps.map(str), st.sampled_from(["ddim25", "5,10", ""])))
def test_a_dpm_solver_s_step_leads_from_one_noise_level_to_the_next(
    adds_noise: bool, diffusion: DiffusionConfig, spec: str
) -> None:
    # With one x0 throughout, x_prev must be distributed as q(x_{t-1} | x_0), as for the other samplers
    plan = dpm_solver_plan(diffusion, spec, adds_noise=adds_noise)
    abar = alphas_cumprod(diffusion)[plan.timesteps]
    abar_prev = np.append(abar[1:], 1.0)
    assert plan.fresh is not None
    for table in (plan.table, plan.fresh):
        lines = dict(zip(PLAN_COLUMNS, table.T.astype(np.float64), strict=True))
        scale = 1e-6 * (1 + np.abs(lines["c_prev"]))
        mean = lines["c_x0"] + lines["c_prev"] + lines["c_xt"] * np.sqrt(abar)
        assert (np.abs(mean - np.sqrt(abar_prev)) < scale).all()
        np.testing.assert_allclose(
            lines["c_xt"] ** 2 * (1 - abar) + lines["noise_scale"] ** 2, 1 - abar_prev, atol=2e-6
        )
    first, last = plan.table[0], dict(zip(PLAN_COLUMNS, plan.table[-1].tolist(), strict=True))
    np.testing.assert_array_equal(first, plan.fresh[0])
    assert (last["c_x0"], last["c_xt"], last["c_prev"], last["noise_scale"]) == (1, 0, 0, 0)
    assert (plan.column("noise_scale")[:-1] > 0).all() == adds_noise


@given(diffusions, steps)
def test_a_dpm_solver_s_own_timesteps_are_even_in_log_snr(diffusion: DiffusionConfig, num_steps: int) -> None:
    kept = respace_by_log_snr(diffusion, str(num_steps)).timestep_map
    assert len(kept) == num_steps
    assert (np.diff(kept) > 0).all()
    assert 0 == kept[0] < kept[-1] < diffusion.num_timesteps
    abar = alphas_cumprod(diffusion)
    log_snr = np.log(abar / (1 - abar))
    wanted = np.linspace(log_snr[0], max(log_snr[-1], LEAST_LOG_SNR), num_steps)
    nearest = np.abs(log_snr[None, :] - wanted[:, None]).argmin(axis=1)
    if (np.diff(nearest) > 0).all():
        np.testing.assert_array_equal(kept, nearest)
    else:  # the others are moved by less than there are timesteps that could not be kept twice
        assert np.abs(kept - nearest).max() < num_steps


def test_a_dpm_solver_s_own_timesteps_begin_where_something_can_be_seen() -> None:
    cosine = DiffusionConfig(num_timesteps=4000, noise_schedule="cosine")
    assert respace_by_log_snr(cosine, "5").timestep_map.tolist() == [0, 93, 1565, 3763, 3983]
    linear = DiffusionConfig(num_timesteps=1000, noise_schedule="linear")
    assert respace_by_log_snr(linear, "5").timestep_map.tolist() == [0, 30, 302, 722, 999]


def test_a_dpm_solver_needs_fewer_steps() -> None:
    def error(plan: SamplingPlan, mean: float = 0.4, deviation: float = 0.3) -> float:
        """Of the deviation, where the exact denoiser samples N(mean, deviation^2): all lines are linear in x_t, x0."""
        abar = alphas_cumprod(KNOWS_X0)[plan.timesteps]
        x, x0 = np.array([0.0, 1.0]), np.zeros(2)  # constant part, and factor of x_T
        for k in range(plan.num_steps):
            line = dict(zip(PLAN_COLUMNS, plan.table[k].tolist(), strict=True))
            gain = deviation**2 * np.sqrt(abar[k]) / (deviation**2 * abar[k] + 1 - abar[k])
            found = gain * x + [mean - gain * np.sqrt(abar[k]) * mean, 0]
            x, x0 = line["c_x0"] * found + line["c_xt"] * x + line["c_prev"] * x0, found
        return abs(float(x[1]) - deviation)

    for steps in ("10", "20"):
        assert error(build_plan(KNOWS_X0, "dpm++", steps)) < 0.5 * error(build_plan(KNOWS_X0, "ddim", steps))


@given(steps)
def test_learned_range_lies_between_the_posterior_variance_and_beta(num_steps: int) -> None:
    schedule = respace(COSINE, str(num_steps)).schedule
    plan = ancestral_plan(COSINE, str(num_steps))
    np.testing.assert_allclose(plan.column("lv_min")[::-1], schedule.posterior_log_variance_clipped, rtol=1e-6)
    np.testing.assert_allclose(plan.column("lv_max")[::-1], np.log(schedule.betas), rtol=1e-6)


def test_fixed_variances_ignore_the_network_s_variance() -> None:
    schedule = respace(COSINE, "50").schedule
    small = ancestral_plan(COSINE.replace(variance="fixed_small"), "50")
    large = ancestral_plan(COSINE.replace(variance="fixed_large"), "50")

    np.testing.assert_array_equal(small.column("lv_min"), small.column("lv_max"))
    np.testing.assert_array_equal(large.column("lv_min"), large.column("lv_max"))
    np.testing.assert_allclose(small.column("lv_min")[::-1], schedule.posterior_log_variance_clipped, rtol=1e-6)
    np.testing.assert_allclose(large.column("lv_min")[::-1], np.log(schedule.fixed_large_variance), rtol=1e-6)


def test_a_learned_log_variance_is_used_unchanged() -> None:
    plan = ancestral_plan(COSINE.replace(variance="learned"), "50")
    assert (plan.column("lv_min") == -1).all()
    assert (plan.column("lv_max") == 1).all()


def test_guidance_is_scaled_by_the_variance_which_is_0_at_the_end_of_fixed_small() -> None:
    assert (ancestral_plan(COSINE, "50").column("g_var") == 1).all()
    small = ancestral_plan(COSINE.replace(variance="fixed_small"), "50").column("g_var")
    assert (small[:-1] == 1).all()
    assert small[-1] == 0
    assert (ancestral_plan(COSINE, "50").column("g_const") == 0).all()


def test_guided_ddim_shifts_x0() -> None:
    abar, _ = _abar(LINEAR, "50")
    plan = ddim_plan(LINEAR, "50", 0.5)
    assert (plan.column("g_var") == 0).all()
    np.testing.assert_allclose(
        plan.column("g_const"), _wide(plan, "c_x0") * (1 - abar) / np.sqrt(abar), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("eta", [-0.01, 1.01, float("nan"), float("inf")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta must be in 0\.\.1"):
        ddim_plan(COSINE, "50", eta)


def test_a_plan_is_built_by_the_name_of_its_sampler() -> None:
    for built, expected in (
        (build_plan(LINEAR, "ancestral", "10", clip=False), ancestral_plan(LINEAR, "10", clip=False)),
        (build_plan(LINEAR, "ddim", "ddim10", 0.3), ddim_plan(LINEAR, "ddim10", 0.3)),
        (build_plan(LINEAR), ancestral_plan(LINEAR, "")),
    ):
        np.testing.assert_array_equal(built.table, expected.table)


def test_invalid_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler must be one of ancestral, ddim, dpm\+\+, sde-dpm\+\+; got 'euler'"):
        build_plan(LINEAR, "euler", "10")
    with pytest.raises(ValueError, match="eta must be 0 for sampler 'ancestral'"):
        build_plan(LINEAR, "ancestral", "10", eta=0.5)
    with pytest.raises(ValueError, match="respacing asks for 4001 steps"):
        build_plan(COSINE, "ancestral", "4001")
    with pytest.raises(ValueError, match="at least 2 steps"):
        build_plan(COSINE, "ddim", "1")


def test_a_table_of_another_shape_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table must be float32 \[num_steps, 12\]"):
        SamplingPlan(np.zeros((5, 11), dtype=np.float32), np.arange(5))
    with pytest.raises(ValueError, match=r"timesteps must be int64 \[5\]; got int64 \(4,\)"):
        SamplingPlan(np.zeros((5, 12), dtype=np.float32), np.arange(4))


def test_a_plan_has_the_training_timestep_of_each_line() -> None:
    plan = build_plan(COSINE, "ancestral", "10,10")
    assert plan.timesteps.tolist() == space_timesteps(COSINE.num_timesteps, "10,10")[::-1].tolist()
    np.testing.assert_array_equal(plan.column("t_model"), respace(COSINE).t_model[plan.timesteps])
