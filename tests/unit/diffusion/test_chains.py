"""Chains that begin with a given image, keep a part of it, jump back, encode it, or consist of one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import RePaintScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion.chains import Chain, Resample, build_chain, nearest_line, resampled_calls, resampled_levels
from diffusion.config import DiffusionConfig
from diffusion.noise import STREAM_JUMP, STREAM_KEPT, STREAM_STEP, STREAM_X_T, normal
from diffusion.plans import SAMPLERS, SamplingPlan, alphas_cumprod, build_plan
from diffusion.update import Step, from_uint8, from_uint8_reversibly, sample_loop, to_uint8
from tests.counts import LONG
from tests.gaussian import (
    COVARIANCE,
    KNOWN,
    KNOWS_X0,
    MEAN,
    PIXELS,
    Array,
    distances,
    exact_x0,
    inpainting,
    kept_and_mask,
    moments,
    plan_moments,
)
from tests.kinds import KINDS, XP, Kind, of_kind

DIFFUSION = DiffusionConfig(num_timesteps=1000)
LONG_ONLY = pytest.mark.skipif(not LONG, reason="10 seconds of network calls: IDDPM_TEST_LONG=1")
SHAPE = (1, 4, 4)
BATCH = 3


def network(x_t: Any, t: Any) -> Any:
    """Mix neighbouring pixels, in sums and products that are rounded alike for both kinds of array."""
    told = t.reshape(-1, 1, 1, 1) / 1024
    xp = np if isinstance(x_t, np.ndarray) else torch
    out = x_t * 0.75 + xp.roll(x_t, 1, 3) * 0.25 - xp.roll(x_t, 1, 2) * told
    return xp.concatenate([out, out * told], 1)


def noise(stream: int, kind: Kind = "numpy") -> Any:
    seeds = XP[kind].arange(BATCH)
    return lambda step: normal(seeds, 0 * seeds, 0 * seeds + step, stream, SHAPE)


def run(plan: SamplingPlan, kind: Kind = "numpy", **arrays: Any) -> Any:
    """Run a chain with the noise of the seeds 0, 1, 2."""
    return sample_loop(
        network,
        plan,
        noise(STREAM_X_T, kind)(0),
        noise(STREAM_STEP, kind),
        kept_noise=noise(STREAM_KEPT, kind),
        jump_noise=noise(STREAM_JUMP, kind),
        **arrays,
    )


def picture(seed: int = 0) -> Array:
    return from_uint8_reversibly(np.random.default_rng(seed).integers(0, 256, (BATCH, 4, 4, 1), dtype=np.uint8))


def half() -> Array:
    mask = np.ones((BATCH, 1, 4, 4), dtype=np.float32)
    mask[:, :, :2] = 0
    return mask


samplers = pytest.mark.parametrize("sampler", SAMPLERS)


# --- where a chain begins


@samplers
def test_strength_one_is_plain_generation_bit_for_bit(sampler: str) -> None:
    plain = build_plan(DIFFUSION, sampler, "10")
    chain = build_chain(DIFFUSION, Chain(sampler=sampler, spec="10", strength=1.0))
    np.testing.assert_array_equal(chain.table, plain.table)
    assert chain.begin == (0.0, 1.0)
    assert run(chain, given=picture()).tobytes() == run(plain).tobytes()


@samplers
def test_strength_zero_returns_the_image_bit_for_bit(sampler: str) -> None:
    chain = build_chain(DIFFUSION, Chain(sampler=sampler, spec="10", strength=0.0))
    assert chain.num_steps == 1
    assert run(chain, given=picture()).tobytes() == picture().tobytes()


@given(st.sampled_from(sorted(SAMPLERS)), st.integers(2, 60), st.floats(0.01, 0.999))
def test_strength_is_the_part_of_the_lines_that_is_run(sampler: str, steps: int, strength: float) -> None:
    plain = build_plan(DIFFUSION, sampler, str(steps))
    chain = build_chain(DIFFUSION, Chain(sampler=sampler, spec=str(steps), strength=strength))
    count = round(strength * plain.num_steps)
    assert chain.num_steps == max(1, count)
    if count:
        assert chain.timesteps.tolist() == plain.timesteps[-count:].tolist()
        np.testing.assert_array_equal(chain.table[1:], plain.table[plain.num_steps - count + 1 :])
        abar = alphas_cumprod(DIFFUSION)[chain.timesteps[0]]
        assert chain.begin == pytest.approx((abar**0.5, (1 - abar) ** 0.5))


@KINDS
def test_a_chain_begins_with_the_image_and_the_noise_of_x_T(kind: Kind) -> None:  # noqa: N802  # the papers' name
    chain = build_chain(DIFFUSION, Chain(sampler="ddim", spec="10", timestep=490))
    assert chain.timesteps[0] == 444
    seen: list[Any] = []

    def recording(x_t: Any, t: Any) -> Any:
        seen.append(x_t)
        return network(x_t, t)

    sample_loop(
        recording, chain, of_kind(kind, noise(STREAM_X_T)(0)), noise(STREAM_STEP, kind), given=of_kind(kind, picture())
    )
    abar = alphas_cumprod(DIFFUSION)[444]
    expected = abar**0.5 * picture() + (1 - abar) ** 0.5 * noise(STREAM_X_T)(0)
    np.testing.assert_allclose(np.asarray(seen[0]), expected, atol=1e-6)


def test_the_nearest_line_is_the_noisier_of_two() -> None:
    plan = build_plan(DIFFUSION, "ancestral", "10")  # 0, 111, 222, ...
    assert [int(plan.timesteps[nearest_line(plan, t)]) for t in (0, 55, 56, 499, 500, 999)] == [
        0,
        0,
        111,
        444,
        555,
        999,
    ]
    assert nearest_line(build_plan(DIFFUSION, "ddim", "ddim20"), 25) == 18  # of 50 and 0


def test_a_multistep_solver_begins_with_its_first_order_wherever_it_begins() -> None:
    plain = build_plan(DIFFUSION, "dpm++", "20")
    chain = build_chain(DIFFUSION, Chain(sampler="dpm++", spec="20", strength=0.5))
    assert plain.column("c_prev")[plain.num_steps - chain.num_steps] != 0
    assert chain.column("c_prev")[0] == 0
    assert (chain.column("c_prev")[1:-1] != 0).all()


# --- kept pixels


@samplers
def test_a_mask_of_ones_is_plain_generation_bit_for_bit(sampler: str) -> None:
    plan = build_plan(DIFFUSION, sampler, "6")
    ones = np.ones((BATCH, 1, 4, 4), dtype=np.float32)
    assert run(plan, given=picture(), mask=ones).tobytes() == run(plan).tobytes()


@KINDS
@pytest.mark.parametrize("chain", [{}, {"strength": 0.5}, {"resample": Resample(3, 2)}, {"strength": 0.0}])
@samplers
def test_kept_pixels_are_the_given_ones_bit_for_bit(sampler: str, chain: dict[str, Any], kind: Kind) -> None:
    plan = build_chain(DIFFUSION, Chain(sampler=sampler, spec="8", **chain))
    x = run(plan, kind, given=of_kind(kind, picture()), mask=of_kind(kind, half()))
    assert np.array_equal(np.asarray(x)[:, :, :2], picture()[:, :, :2])
    assert np.array_equal(to_uint8(x)[:, :2], to_uint8(picture())[:, :2])


def test_kept_pixels_are_at_the_noise_level_at_which_a_line_ends() -> None:
    plan = build_plan(DIFFUSION, "ddim", "10")
    seen: list[Step[Any]] = []
    none = np.zeros((BATCH, 1, 4, 4), dtype=np.float32)
    run(plan, given=picture(), mask=none, on_step=lambda _, step: seen.append(step))
    for index, step in enumerate(seen):
        abar = 1.0 if index == plan.num_steps - 1 else alphas_cumprod(DIFFUSION)[plan.timesteps[index + 1]]
        expected = abar**0.5 * picture() + (1 - abar) ** 0.5 * noise(STREAM_KEPT)(index)
        np.testing.assert_allclose(step.x_prev, expected, atol=1e-6)


def test_8_bit_pixels_come_back_as_they_were() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = from_uint8_reversibly(pixels)
    assert np.array_equal(to_uint8(images), pixels)
    assert not np.array_equal(to_uint8(from_uint8(pixels)), pixels)
    assert np.abs(images - from_uint8(pixels)).max() < 1e-6
    assert (images.min(), images.max()) == (-1, 1)


# --- RePaint


@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 12))
def test_the_calls_are_those_of_the_paper_s_schedule(steps: int, times: int, jump: int) -> None:
    scheduler = RePaintScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps, jump_length=jump, jump_n_sample=times)
    stride = 1000 // steps
    levels = [int(t) // stride for t in scheduler.timesteps]
    # The library lists the levels that are passed on the way up, too, and calls the network where it goes down
    called = [level for level, after in zip(levels, [*levels[1:], -1], strict=True) if after < level]
    assert resampled_levels(steps, Resample(times, jump)) == called
    assert resampled_calls(steps, Resample(times, jump)) == len(called)


@given(st.sampled_from(sorted(SAMPLERS)), st.integers(3, 20), st.integers(1, 3), st.integers(1, 4))
def test_a_jump_leads_to_the_noise_level_of_the_next_line(sampler: str, steps: int, times: int, jump: int) -> None:
    plan = build_chain(DIFFUSION, Chain(sampler=sampler, spec=str(steps), resample=Resample(times, jump)))
    plain = build_plan(DIFFUSION, sampler, str(steps))
    assert plan.num_steps == len(resampled_levels(plain.num_steps, Resample(times, jump)))
    abar = alphas_cumprod(DIFFUSION)
    r_x, r_noise = plan.after_column("r_x"), plan.after_column("r_noise")
    k_x0, k_noise = (plan.after_column(name).astype(np.float64) for name in ("k_x0", "k_noise"))
    for k in range(plan.num_steps - 1):
        # A kept pixel, at the level at which the line ends, is at the level of the next one after the jump
        assert r_x[k] * k_x0[k] == pytest.approx(abar[plan.timesteps[k + 1]] ** 0.5, abs=1e-6)
        assert (r_x[k] * k_noise[k]) ** 2 + r_noise[k] ** 2 == pytest.approx(1 - abar[plan.timesteps[k + 1]], abs=1e-6)
        assert (r_noise[k] > 0) == (plan.timesteps[k + 1] >= plan.timesteps[k])
        if r_noise[k] > 0:
            assert plan.column("c_prev")[k + 1] == 0  # the last x0 is of another level
    assert r_noise[-1] == 0


def test_resampling_once_changes_nothing() -> None:
    once = build_chain(DIFFUSION, Chain(sampler="dpm++", spec="10", resample=Resample(1, 3)))
    np.testing.assert_array_equal(once.table, build_plan(DIFFUSION, "dpm++", "10").table)


def sampled(plan: SamplingPlan, count: int) -> npt.NDArray[np.float64]:
    """Inpaint `count` triples with the exact denoiser, in one batch; return the made pixels [count, 2]."""
    generator = np.random.default_rng(0)
    shape = (100, 1, 1, count // 100 * PIXELS)

    def z(_: int) -> Array:
        return generator.standard_normal(shape, dtype=np.float32)

    known, mask = kept_and_mask(shape)
    x = sample_loop(exact_x0, plan, z(0), z, given=known, mask=mask, kept_noise=z, jump_noise=z).reshape(-1, PIXELS)
    assert (x[:, 0] == KNOWN).all()
    return x[:, 1:].astype(np.float64)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_10000_inpainted_samples_have_the_moments_of_the_plan(sampler: str) -> None:
    plan = build_chain(*inpainting(sampler, 40, 5, 10))
    x = sampled(plan, 10_000)
    mean, covariance = moments(plan)
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(x.mean(0), mean, rtol=0, atol=4 * deviation.max() / 100)
    np.testing.assert_allclose(x.std(0), deviation, rtol=4 / 140)


@pytest.mark.parametrize(
    ("case", "bias", "wider", "correlated"),
    [
        # 781 network calls; 3961
        (inpainting("ancestral", 40, 20, 1, variance="fixed_large"), 0.085, 0.04, 0.007),
        pytest.param(inpainting("ancestral", 100, 40, 1, variance="fixed_large"), 0.035, 0.012, 0.005, marks=LONG_ONLY),
    ],
)
def test_10000_inpainted_samples_have_the_conditional_distribution(
    case: tuple[DiffusionConfig, Chain], bias: float, wider: float, correlated: float
) -> None:
    """The bounds are what a plan of finitely many steps misses, in closed form, and four standard errors."""
    x = sampled(build_chain(*case), 10_000)
    for (mean, deviation, correlation), errors in (
        (distances(*plan_moments(case)), 0.0),
        (distances(x.mean(0), np.cov(x.T)), 4.0),
    ):
        assert np.abs(mean).max() < bias + errors / 100
        assert np.abs(deviation - 1).max() < wider + errors / 141
        assert abs(correlation) < correlated + errors / 100


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_resampling_leads_to_the_conditional_distribution(sampler: str) -> None:
    # Without it, made pixels know of the kept ones only through noise: the mean is off by half a deviation or more
    cases = [inpainting(sampler, steps, times, 10) for steps, times in ((250, 1), (250, 10), (500, 20))]
    found = [distances(*plan_moments(case)) for case in cases]
    wrong = [float(np.abs(mean).max()) for mean, _, _ in found]
    assert wrong[0] > 0.5
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] < 0.12
    np.testing.assert_allclose(found[-1][1], 1, rtol=0.06)


# --- encoding


def test_encoding_and_decoding_lead_back_the_better_the_more_steps() -> None:
    generator = np.random.default_rng(0)
    images = generator.multivariate_normal(MEAN, COVARIANCE, 100).astype(np.float32).reshape(100, 1, 1, PIXELS)
    zeros = np.zeros_like(images)
    errors = []
    for spec in ("10", "100", "1000"):
        encode = build_chain(KNOWS_X0, Chain(kind="encode", spec=spec, clip=False))
        decode = build_chain(KNOWS_X0, Chain(sampler="ddim", spec=spec, clip=False, from_latent=True))
        assert encode.num_steps == decode.num_steps - 1
        assert (np.diff(encode.timesteps) > 0).all()
        assert encode.begin == decode.begin == (1.0, 0.0)
        latent = sample_loop(exact_x0, encode, zeros, zeros, given=images)
        back = sample_loop(exact_x0, decode, zeros, zeros, given=latent)
        errors.append(float(np.abs(back - images).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3


def test_encoding_up_to_a_timestep_decodes_from_there() -> None:
    encode = build_chain(DIFFUSION, Chain(kind="encode", spec="10", timestep=490))
    decode = build_chain(DIFFUSION, Chain(sampler="ddim", spec="10", timestep=490, from_latent=True))
    assert encode.timesteps.tolist() == [0, 111, 222, 333]
    assert decode.timesteps.tolist() == [444, 333, 222, 111, 0]
    nothing = build_chain(DIFFUSION, Chain(kind="encode", spec="10", timestep=0))
    assert run(nothing, given=picture()).tobytes() == picture().tobytes()


# --- one call


@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_small"])
@KINDS
def test_one_call_returns_the_prediction_and_the_log_variance(kind: Kind, variance: str) -> None:
    diffusion = DIFFUSION.replace(variance=variance)
    plan = build_chain(diffusion, Chain(kind="denoise", timestep=700))
    seen: list[Step[Any]] = []
    x_t = of_kind(kind, 3 * picture())
    x = run(plan, kind, given=x_t, on_step=lambda _, step: seen.append(step))
    output = network(3 * picture(), np.full(BATCH, 700, dtype=np.float32))
    assert plan.num_steps == 1
    np.testing.assert_array_equal(np.asarray(x), output[:, :1])
    ancestral = build_plan(diffusion, "ancestral", "")
    low, high = (ancestral.column(name)[-701] for name in ("lv_min", "lv_max"))
    np.testing.assert_array_equal(np.asarray(seen[0].x0), low + (high - low) / 2 * (output[:, 1:] + 1))


# --- what is refused


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"strength": 1.5}, r"strength must be in 0\.\.1; got 1\.5"),
        ({"timestep": 1000}, r"timestep must be in 0\.\.999; got 1000"),
        ({"strength": 0.5, "timestep": 3}, "strength excludes a timestep"),
        ({"strength": 0.5, "from_latent": True}, "strength excludes a timestep and a latent"),
        ({"kind": "denoise"}, "needs the timestep"),
        ({"kind": "encode", "strength": 0.5}, "are for sampling; the chain's kind is 'encode'"),
        ({"resample": Resample(0, 3)}, r"must be at least 1; got \[0, 3\]"),
    ],
)
def test_chains_that_cannot_be_are_refused(chain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_chain(DIFFUSION, Chain(**{"spec": "10", **chain}))


def test_arrays_that_are_missing_are_named() -> None:
    zeros = np.zeros_like(picture())
    with pytest.raises(ValueError, match="given must be set"):
        sample_loop(network, build_chain(DIFFUSION, Chain(spec="5", strength=0.5)), zeros, zeros)
    with pytest.raises(ValueError, match="needs noise that is missing"):
        sample_loop(network, build_plan(DIFFUSION, spec="5"), zeros, zeros, given=zeros, mask=half())
    plan = SamplingPlan(build_plan(DIFFUSION, spec="5").table, build_plan(DIFFUSION, spec="5").timesteps)
    with pytest.raises(ValueError, match="does not say what follows"):
        sample_loop(network, plan, zeros, zeros, given=zeros, mask=half())
