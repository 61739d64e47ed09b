"""Complete chains compared with OpenAI's, from the same x_T and with the same noise.

Tolerances leave room for another machine's network error, which early steps multiply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from diffusion.arrays import to_numpy
from diffusion.plans import build_plan
from diffusion.update import Step, sample_loop, to_uint8
from tests import golden
from tests.kinds import KINDS, Kind, of_kind, on_kind

GOLDEN = golden.load("diffusion_loops")


@KINDS
@pytest.mark.parametrize("case", golden.supported_cases(GOLDEN), ids=lambda case: case["key"])
def test_a_chain_equals_the_reference(case: dict[str, Any], kind: Kind) -> None:
    key = case["key"]
    network = on_kind(kind, golden.network(case["model"]))
    y, cond = GOLDEN.optional(f"{key}.y"), golden.cond(GOLDEN, case["model"], f"{key}.low_res")
    plan = build_plan(
        golden.diffusion_config(case),
        "ddim" if case["function"] == "ddim_sample_loop" else "ancestral",
        case["respacing"],
        eta=case["eta"] or 0.0,
        clip=case["clip_denoised"],
    )
    steps: list[Step[Any]] = []

    def denoise(x_t: Any, t_model: Any) -> Any:
        return network(x_t, t_model, y, cond)

    final = sample_loop(
        denoise,
        plan,
        of_kind(kind, GOLDEN[f"{key}.init_noise"]),
        of_kind(kind, GOLDEN[f"{key}.step_noise"]),
        on_step=lambda _, step: steps.append(step),
    )

    np.testing.assert_array_equal(plan.column("t_model"), GOLDEN[f"{key}.model_t"].astype(np.float32))
    samples = np.stack([to_numpy(step.x_prev) for step in steps])
    _assert_close(samples, key, "samples")
    pred_x0 = np.stack([to_numpy(step.x0) for step in steps])
    _assert_close(pred_x0, key, "pred_xstart")
    _assert_close(to_numpy(final), key, "final")
    assert np.abs(to_uint8(final).astype(int) - GOLDEN[f"{key}.uint8"]).max() <= 1


def _assert_close(actual: npt.NDArray[Any], key: str, name: str) -> None:
    np.testing.assert_allclose(actual, GOLDEN[f"{key}.{name}"], rtol=0, atol=golden.CHAIN_TOLERANCES[name])
