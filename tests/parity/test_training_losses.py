"""Training losses and their gradients compared with OpenAI's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from diffusion.losses import LossTables, LossType, TrainingLosses, q_sample, training_losses
from diffusion.respacing import respace
from diffusion.unet import UNet
from tests import golden

GOLDEN = golden.load("training_losses")
CASES = golden.supported_cases(GOLDEN)
GRADIENT_CASES = [case for case in CASES if case["has_grad"]]


def _losses(case: dict[str, Any], network: UNet) -> TrainingLosses:
    key = case["key"]
    diffusion = golden.diffusion_config(case)
    process = respace(diffusion, case["respacing"])
    tables = LossTables.from_process(process)
    x0, noise, t = (GOLDEN.tensor(f"{key}.{name}") for name in ("x_start", "noise", "t"))

    x_t = q_sample(tables, x0, t, noise)
    output = network(x_t, torch.from_numpy(process.t_model)[t], GOLDEN.optional(f"{key}.y"))
    loss: LossType = "hybrid" if diffusion.learns_variance else "simple"
    if case["loss_type"].endswith("KL"):
        loss = "vlb"
    rescale = case["loss_type"].startswith("RESCALED")
    return training_losses(tables, diffusion, output, x0, x_t, noise, t, loss=loss, rescale=rescale)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_losses_equal_the_reference(case: dict[str, Any]) -> None:
    key = case["key"]
    with torch.no_grad():
        losses = _losses(case, golden.network(case["model"]))

    tight = {"rtol": 1e-4, "atol": 0.0}
    of_bound = {"rtol": 2e-3, "atol": 1e-5 * case["vb_scale"]}  # float32 cancellation in the KL
    is_bound = case["loss_type"].endswith("KL")
    torch.testing.assert_close(losses.loss, GOLDEN.tensor(f"{key}.terms.loss"), **(of_bound if is_bound else tight))
    if "mse" in case["terms"]:
        torch.testing.assert_close(losses.mse, GOLDEN.tensor(f"{key}.terms.mse"), rtol=1e-4, atol=0.0)
    if "vb" in case["terms"]:
        torch.testing.assert_close(losses.vb_bpd * case["vb_scale"], GOLDEN.tensor(f"{key}.terms.vb"), **of_bound)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case["key"])
def test_gradients_equal_the_reference(case: dict[str, Any]) -> None:
    network = copy.deepcopy(golden.network(case["model"])).requires_grad_(True)
    torch.autograd.backward(_losses(case, network).loss.mean())

    parameters = dict(network.named_parameters())
    squares = 0.0
    for parameter in parameters.values():
        assert parameter.grad is not None
        squares += float(parameter.grad.double().square().sum())
    assert squares**0.5 == pytest.approx(float(GOLDEN[f"{case['key']}.grad.norm_total"]), rel=golden.GRADIENT_TOLERANCE)
    for name in ("out.2.bias", "out.2.weight", "time_embed.0.weight"):
        expected = GOLDEN.tensor(f"{case['key']}.grad.{name}")
        actual = parameters[name].grad
        assert actual is not None
        cancelled = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=golden.GRADIENT_TOLERANCE, atol=cancelled)
