from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.config import DiffusionConfig
from diffusion.respacing import respace, space_timesteps
from diffusion.schedules import Schedule, named_betas


@given(st.integers(2, 4000), st.data())
def test_a_number_of_steps_is_exact_and_keeps_both_ends(num_timesteps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, num_timesteps))
    timesteps = space_timesteps(num_timesteps, str(count))

    assert len(timesteps) == count
    assert timesteps[0] == 0
    assert timesteps[-1] == num_timesteps - 1
    assert (np.diff(timesteps) > 0).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_sections_keep_their_numbers_of_steps(counts: list[int]) -> None:
    timesteps = space_timesteps(240, ",".join(map(str, counts)))

    assert len(timesteps) == sum(counts)
    size = 240 // len(counts)
    inside = [int(((timesteps >= i * size) & (timesteps < (i + 1) * size)).sum()) for i in range(len(counts))]
    if 240 % len(counts) == 0:
        assert inside == counts


@given(st.integers(2, 4000), st.integers(1, 4000))
def test_ddim_spacing_is_one_stride_from_zero_or_refused(num_timesteps: int, count: int) -> None:
    try:
        timesteps = space_timesteps(num_timesteps, f"ddim{count}")
    except ValueError as error:
        assert "the nearest possible are" in str(error)  # noqa: PT017  # both outcomes are correct
        return
    assert len(timesteps) == count
    assert timesteps[0] == 0
    assert len(set(np.diff(timesteps))) <= 1


def test_no_spec_keeps_every_timestep() -> None:
    np.testing.assert_array_equal(space_timesteps(7, ""), np.arange(7))


@pytest.mark.parametrize("spec", ["fast", "10,", "-5", "ddim", "10 20", "1.5", "ddim-3", "٣"])
def test_an_invalid_specification_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="respacing must be a number of steps"):
        space_timesteps(1000, spec)


def test_the_error_names_the_section_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="asks for 60 steps in section 2 of 2, which has only 50 of the 100"):
        space_timesteps(100, "10,60")


def test_a_process_of_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="must keep at least 2 steps"):
        respace(DiffusionConfig(), "1")


@given(st.integers(2, 250))
def test_the_shorter_process_has_the_same_signal_at_the_timesteps_it_keeps(count: int) -> None:
    diffusion = DiffusionConfig(num_timesteps=1000, noise_schedule="linear")
    process = respace(diffusion, str(count))

    full = Schedule(named_betas("linear", 1000)).alphas_cumprod
    np.testing.assert_allclose(process.schedule.alphas_cumprod, full[process.timestep_map], rtol=1e-9)
    assert process.num_steps == count


def test_the_network_gets_the_training_timestep() -> None:
    process = respace(DiffusionConfig(num_timesteps=4000), "25")
    np.testing.assert_array_equal(process.t_model, process.timestep_map)


def test_rescaled_timesteps_are_below_1000_for_every_chain() -> None:
    process = respace(DiffusionConfig(num_timesteps=4000, rescale_timesteps=True), "")
    np.testing.assert_allclose(process.t_model, np.arange(4000) / 4)
    assert process.t_model.dtype == np.float32
