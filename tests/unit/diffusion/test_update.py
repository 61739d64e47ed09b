from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.arrays import to_numpy
from diffusion.config import DiffusionConfig
from diffusion.noise import STREAM_STEP, STREAM_X_T, normal
from diffusion.plans import PLAN_COLUMNS, SamplingPlan, ancestral_plan, build_plan, ddim_plan
from diffusion.update import PlanRows, Step, advance, from_uint8, sample_loop, to_uint8
from tests import golden
from tests.kinds import KINDS, Kind, of_kind, on_kind

COSINE = DiffusionConfig()
PLANS = (
    ancestral_plan(COSINE, "50"),
    ddim_plan(COSINE, "30", 0.0),
    ddim_plan(COSINE, "17", 0.5, clip=False),
    ancestral_plan(COSINE.replace(variance="fixed_large"), "10,5,5"),
    ancestral_plan(COSINE.replace(variance="learned", prediction="x0"), "7", clip=False),
)


def _rows(lines: np.ndarray[Any, Any]) -> PlanRows[Tensor]:
    return PlanRows.from_lines(torch.from_numpy(np.array(lines)))


def _line(**columns: float) -> PlanRows[Tensor]:
    line = [columns.get(name, 0.0) for name in PLAN_COLUMNS]
    return PlanRows.from_lines(torch.tensor([line], dtype=torch.float32))


@KINDS
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 33), st.integers(1, 33)),
    picks=st.lists(st.tuples(st.integers(0, len(PLANS) - 1), st.floats(0, 1)), min_size=2, max_size=9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_a_row_does_not_depend_on_samplers_and_steps_of_other_rows(
    kind: Kind, shape: tuple[int, int, int], picks: list[tuple[int, float]], seed: int
) -> None:
    lines = np.stack([PLANS[plan].table[round(at * (PLANS[plan].num_steps - 1))] for plan, at in picks])
    rng = np.random.default_rng(seed)
    arguments = [rng.standard_normal((len(picks), *shape), dtype=np.float32) for _ in range(6)]
    together = _advance(kind, lines, arguments)

    for row in range(len(picks)):
        alone = _advance(kind, lines[row : row + 1], [argument[row : row + 1] for argument in arguments])
        np.testing.assert_array_equal(alone.x_prev[0], together.x_prev[row])
        np.testing.assert_array_equal(alone.x0[0], together.x0[row])


def _advance(kind: Kind, lines: np.ndarray[Any, Any], arguments: list[np.ndarray[Any, Any]]) -> Step[Any]:
    rows = PlanRows.from_lines(of_kind(kind, lines))
    return Step(*(to_numpy(part) for part in advance(rows, *(of_kind(kind, argument) for argument in arguments))))


def _rowwise_network(x_t: Tensor, t_model: Tensor) -> Tensor:
    """A network whose output for a row depends on that row only, to the last bit."""
    level = (t_model / 4000)[:, None, None, None]
    return torch.cat([x_t * 0.7 + level, x_t * level - 0.5], dim=1)


def _noise_for(seed: int, image_index: int, step: int, stream: int) -> Tensor:
    key = torch.tensor([seed])
    return normal(key, torch.tensor([image_index]), torch.tensor([step]), stream, (1, 6, 6))


def test_images_of_a_mixed_batch_equal_images_sampled_alone() -> None:
    """Simulate a step-level engine: images of five plans start at different times and share each call."""
    plans = PLANS[:4]
    starts, seeds = [0, 3, 11, 2], [5, 5, 2**53 - 1, 77]
    alone: list[Tensor] = []
    for image, (plan, seed) in enumerate(zip(plans, seeds, strict=True)):
        alone.append(
            sample_loop(
                _rowwise_network,
                plan,
                _noise_for(seed, image, 0, STREAM_X_T),
                lambda step, seed=seed, image=image: _noise_for(seed, image, step, STREAM_STEP),  # type: ignore[misc]
            )
        )

    x = torch.cat([_noise_for(seed, image, 0, STREAM_X_T) for image, seed in enumerate(seeds)])
    for now in range(max(start + plan.num_steps for start, plan in zip(starts, plans, strict=True))):
        batch = [i for i, plan in enumerate(plans) if 0 <= now - starts[i] < plan.num_steps]
        steps = torch.tensor([now - starts[i] for i in batch])
        rows = _rows(np.stack([plans[i].table[now - starts[i]] for i in batch]))
        output = _rowwise_network(x[batch], rows.t_model.flatten())
        z = normal(torch.tensor([seeds[i] for i in batch]), torch.tensor(batch), steps, STREAM_STEP, (1, 6, 6))
        zeros = torch.zeros_like(z)
        x[batch] = advance(rows, x[batch], zeros, output[:, :1], output[:, 1:], z, zeros).x_prev

    assert torch.equal(x, torch.cat(alone))


@KINDS
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("line", [3, -1])
@pytest.mark.parametrize(
    ("out_value", "var_value"),
    [(np.nan, 0.0), (np.inf, 0.0), (-np.inf, 0.0), (0.0, np.nan), (0.0, np.inf), (0.0, -np.inf)],
)
def test_a_row_whose_network_output_overflowed_fails_alone(
    kind: Kind, line: int, clip: bool, out_value: float, var_value: float
) -> None:
    zeros = np.zeros((3, 1, 4, 4), dtype=np.float32)
    out, var_values = zeros.copy(), zeros.copy()
    out[1, 0, 2, 2], var_values[1, 0, 2, 2] = out_value, var_value
    # Clipping makes an infinite x0 finite again, and the last step reads no variance. Warnings are errors here: numpy
    # must not warn in either case.
    lines = np.stack([ancestral_plan(COSINE, "50", clip=clip).table[line]] * 3)
    step = _advance(kind, lines, [zeros + 1, zeros, out, var_values, zeros + 1, zeros])

    assert step.ok.tolist() == [True, False, True]
    assert np.isfinite(step.x_prev[[0, 2]]).all()
    assert np.isnan(step.x_prev[1]).all()


@KINDS
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_a_prediction_that_overflows_before_clipping_fails(kind: Kind, value: float) -> None:
    zeros = np.zeros((2, 1, 4, 4), dtype=np.float32)
    out = zeros.copy()
    out[1, 0, 2, 2] = value
    lines = np.stack([ancestral_plan(COSINE, "50").table[0]] * 2)
    assert _advance(kind, lines, [zeros + 1, zeros, out, zeros, zeros + 1, zeros]).ok.tolist() == [True, False]


@KINDS
@pytest.mark.parametrize("fails_at", [0, 20, 49])
def test_a_row_that_overflowed_at_any_step_is_nan_at_the_end(kind: Kind, fails_at: int) -> None:
    plan, calls = ancestral_plan(COSINE, "50"), iter(range(50))

    def network(x_t: Tensor, t_model: Tensor) -> Tensor:
        output = _rowwise_network(x_t, t_model)
        if next(calls) == fails_at:
            output[1, 0, 2, 2] = torch.inf
        return output

    x_T, noise = torch.ones(2, 1, 6, 6), torch.zeros(50, 2, 1, 6, 6)
    steps: list[list[bool]] = []
    x = sample_loop(
        on_kind(kind, network),
        plan,
        of_kind(kind, x_T),
        of_kind(kind, noise),
        on_step=lambda _, step: steps.append(step.ok.tolist()),
    )
    assert steps == [[True, k < fails_at] for k in range(50)]
    assert np.isfinite(to_numpy(x)[0]).all()
    assert np.isnan(to_numpy(x)[1]).all()
    assert to_uint8(x)[1].max() == 0


@KINDS
@pytest.mark.parametrize(("out_value", "var_value"), [(np.nan, 0.0), (np.inf, 0.0), (0.0, 1e30), (0.0, np.inf)])
def test_a_row_that_is_not_finite_is_reported_and_changes_no_other(
    kind: Kind, out_value: float, var_value: float
) -> None:
    zeros = np.zeros((3, 1, 4, 4), dtype=np.float32)
    out, var_values = zeros.copy(), zeros.copy()
    out[1, 0, 2, 2], var_values[1, 0, 2, 2] = out_value, var_value
    # Without clipping, which makes an infinite x0 finite again. Warnings are errors here: numpy must not warn.
    lines = np.stack([ancestral_plan(COSINE, "50", clip=False).table[3]] * 3)
    step = _advance(kind, lines, [zeros + 1, zeros, out, var_values, zeros + 1, zeros])

    assert step.ok.tolist() == [True, False, True]
    assert np.isfinite(step.x_prev[[0, 2]]).all()


def test_a_chain_of_numpy_arrays_equals_one_of_tensors() -> None:
    rng = np.random.default_rng(0)
    plan = ddim_plan(COSINE, "17", 0.5)
    x_T = rng.standard_normal((2, 1, 6, 6), dtype=np.float32)
    noise = rng.standard_normal((plan.num_steps, 2, 1, 6, 6), dtype=np.float32)
    of_torch = sample_loop(_rowwise_network, plan, torch.from_numpy(x_T), torch.from_numpy(noise))
    of_numpy = sample_loop(on_kind("numpy", _rowwise_network), plan, x_T, noise)

    assert isinstance(of_numpy, np.ndarray)
    np.testing.assert_allclose(of_numpy, of_torch.numpy(), rtol=0, atol=golden.CHAIN_TOLERANCES["final"])


def test_noise_is_not_read_where_the_plan_adds_none() -> None:
    rows = _rows(PLANS[0].table[-1:])
    x = torch.full((1, 1, 2, 2), 0.5)
    zeros = torch.zeros_like(x)
    step = advance(rows, x, zeros, zeros, zeros, torch.full_like(x, torch.nan), zeros)

    assert step.ok.all()


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 1.0), (np.inf, 3.0)])
def test_x0_is_clamped_only_where_the_plan_requires_it(clip: float, expected: float) -> None:
    one = torch.ones(1, 1, 2, 2)
    step = advance(_line(clip=clip, a_out=1.0, c_x0=1.0), one, one, 3 * one, one, one, one)

    torch.testing.assert_close(step.x0, expected * one)
    torch.testing.assert_close(step.x_prev, expected * one)


def test_every_column_has_the_effect_of_its_name() -> None:
    one = torch.ones(1, 1, 2, 2)
    columns = {
        "a_x": 0.25, "a_out": 0.5, "clip": 10.0, "c_x0": 2.0, "c_xt": 3.0, "c_prev": 5.0,
        "lv_min": 0.0, "lv_max": float(np.log(4.0)), "noise_scale": 0.5, "g_var": 7.0, "g_const": 11.0,
    }  # fmt: skip
    # var_values 1: the variance is 4, its root 2
    step = advance(_line(**columns), 4 * one, 0.1 * one, 6 * one, one, 3 * one, 0.01 * one)

    x0 = 0.25 * 4 + 0.5 * 6
    torch.testing.assert_close(step.x0, x0 * one)
    expected = 2 * x0 + 3 * 4 + 5 * 0.1 + (7 * 4 + 11) * 0.01 + 0.5 * 2 * 3
    torch.testing.assert_close(step.x_prev, expected * one)


@pytest.mark.parametrize("plan", PLANS[:4])
def test_an_ideal_denoiser_samples_its_image(plan: SamplingPlan) -> None:
    image = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    lines = {float(line[0]): line for line in plan.table}

    def ideal(x_t: Tensor, t_model: Tensor) -> Tensor:
        line = lines[float(t_model[0])]
        a_x, a_out = float(line[1]), float(line[2])
        return (image - a_x * x_t) / a_out  # the eps whose x0 is the image

    torch.manual_seed(0)
    noise = torch.randn(plan.num_steps, 1, 1, 8, 8)
    x = sample_loop(ideal, plan, torch.randn(1, 1, 8, 8), noise)
    torch.testing.assert_close(x, image, rtol=0, atol=1e-3)


def test_noise_may_be_a_tensor_a_list_or_a_function_of_the_step() -> None:
    torch.manual_seed(0)
    plan = PLANS[0]
    x_T, noise = torch.randn(2, 1, 6, 6), torch.randn(plan.num_steps, 2, 1, 6, 6)
    given_tensor = sample_loop(_rowwise_network, plan, x_T, noise)

    assert torch.equal(given_tensor, sample_loop(_rowwise_network, plan, x_T, list(noise)))
    assert torch.equal(given_tensor, sample_loop(_rowwise_network, plan, x_T, lambda step: noise[step]))


def test_noise_is_drawn_only_where_it_is_added() -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 1, 6, 6)

    sample_loop(_rowwise_network, build_plan(COSINE, "ancestral", "5"), torch.zeros(1, 1, 6, 6), noise)
    assert asked == [0, 1, 2, 3]
    sample_loop(_rowwise_network, build_plan(COSINE, "ddim", "5"), torch.zeros(1, 1, 6, 6), noise)
    assert asked == [0, 1, 2, 3]


def test_the_loop_passes_each_step_the_x0_of_the_previous_step() -> None:
    table = np.zeros((3, len(PLAN_COLUMNS)), dtype=np.float32)
    for column, value in (("clip", np.inf), ("a_out", 1.0), ("c_prev", 1.0)):
        table[:, PLAN_COLUMNS.index(column)] = value
    table[:, PLAN_COLUMNS.index("t_model")] = [7, 5, 2]
    seen: list[float] = []

    sample_loop(
        lambda x_t, t_model: torch.ones_like(x_t) * t_model[:, None, None, None],
        SamplingPlan(table, np.array([7, 5, 2])),
        torch.zeros(1, 1, 2, 2),
        [],
        on_step=lambda _, step: seen.append(step.x_prev[0, 0, 0, 0].item()),
    )
    assert seen == [0, 7, 5]


def test_the_loop_reports_each_step_and_records_no_gradients() -> None:
    seen: list[tuple[int, Step[Tensor]]] = []
    weight = torch.ones(1, requires_grad=True)
    x = sample_loop(
        lambda x_t, _: x_t * weight,
        PLANS[3],
        torch.ones(1, 1, 4, 4),
        torch.zeros(PLANS[3].num_steps, 1, 1, 4, 4),
        on_step=lambda index, step: seen.append((index, step)),
    )

    assert [index for index, _ in seen] == list(range(PLANS[3].num_steps))
    assert torch.equal(seen[-1][1].x_prev, x)
    assert not x.requires_grad


def test_a_gradient_moves_the_image() -> None:
    x_T, noise = torch.zeros(1, 1, 4, 4), torch.zeros(50, 1, 1, 4, 4)
    plain = sample_loop(_rowwise_network, PLANS[0], x_T, noise)
    pushed = sample_loop(_rowwise_network, PLANS[0], x_T, noise, gradient=lambda x_t, _: torch.ones_like(x_t))

    assert (pushed > plain).all()


def test_plan_rows_have_the_columns_in_order() -> None:
    rows = PlanRows.from_lines(torch.arange(24, dtype=torch.float32).reshape(2, 12))
    for index, column in enumerate(rows):
        assert column.shape == (2, 1, 1, 1)
        assert column.flatten().tolist() == [index, 12 + index]


@KINDS
def test_pixels_are_truncated_after_clamping_and_channels_come_last(kind: Kind) -> None:
    x = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0], dtype=np.float32).reshape(1, 6, 1, 1)
    pixels = to_uint8(of_kind(kind, np.broadcast_to(x, (1, 6, 2, 3))))

    assert pixels.shape == (1, 2, 3, 6)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_pixels_become_images_in_channel_order() -> None:
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    x = from_uint8(pixels)

    assert x.shape == (2, 5, 3, 4)
    assert x.dtype == np.float32
    torch.testing.assert_close(x[1, 4, 2, 3].item(), pixels[1, 2, 3, 4] / 127.5 - 1)
    assert from_uint8(np.array([[[[0, 255]]]], dtype=np.uint8)).ravel().tolist() == [-1, 1]
