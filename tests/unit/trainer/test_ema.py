from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden import load
from trainer.ema import EMA, exponential_decay, power_decay, power_exponent


def test_the_exponential_average_matches_the_reference() -> None:
    golden = load("misc")
    for rate in golden.config["ema"]["rates"]:
        module = nn.ParameterDict({"p": nn.Parameter(golden.tensor("ema.init0"))})
        average = EMA(module, exponential_decay(rate, warmup=False))
        for source, target in zip(golden.tensor("ema.source0"), golden.tensor(f"ema.rate{rate}.target0"), strict=True):
            average.update({"p": source})
            torch.testing.assert_close(average.weights["p"], target, rtol=1e-6, atol=1e-6)


def test_the_warm_up_of_the_exponential_average_ends_at_its_decay() -> None:
    decay = exponential_decay(0.9999, warmup=True)
    assert decay(0) == pytest.approx(0.1)
    assert decay(10**6) == 0.9999


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_power_function_are_those_of_the_paper(sigma_rel: float, gamma: float) -> None:
    assert power_exponent(sigma_rel) == pytest.approx(gamma, abs=0.005)


def test_the_power_average_is_the_weighted_mean_of_its_profile() -> None:
    """The weight of update i of n is the integral of t^gamma over its share of the time, to rounding of 1/n."""
    n, gamma = 400, power_exponent(0.1)
    average = EMA(nn.ParameterDict({"p": nn.Parameter(torch.zeros(n))}), power_decay(0.1))
    for row in torch.eye(n):
        average.update({"p": row})
    weights = average.weights["p"].double().numpy()
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.cumsum(weights), edges[1:], atol=gamma / n)
    centres = (np.arange(n) + 0.5) / n
    mean = (weights * centres).sum()
    assert np.sqrt((weights * (centres - mean) ** 2).sum()) == pytest.approx(0.1, abs=0.003)


@pytest.mark.parametrize("sigma_rel", [0.0, 0.3, -1.0])
def test_an_impossible_width_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be above 0 and below 0\.288"):
        power_exponent(sigma_rel)
