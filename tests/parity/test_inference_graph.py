"""Networks rewritten for compilers are the same function as the original networks."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.classifier import Classifier
from diffusion.config import ClassifierConfig
from diffusion.unet import RowLinear, UNet
from model_export.classifier_gradient import _avg_pool2d_backward, _convolution_backward
from model_export.inference_graph import rewrite
from model_export.inference_layers import FeatureMap, InferenceNorm, InputConv2d, silu_of_twice
from tests import golden
from tests.networks import random_classifier
from tests.parity.test_networks import CLASSIFIERS, UNETS

LOW = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Limits of the relative error, those of `model_export.parity.LIMITS`."""


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float32
    return float((actual - expected).norm() / expected.norm())


def run(network: UNet | Classifier, name: str, t: Tensor) -> Tensor:
    data = golden.load(name)
    x = data.tensor("x")
    if isinstance(network, UNet):
        return network(x, t, data.optional("y"), golden.cond(data, name))
    return network(x, t)


def plain(name: str) -> Any:
    return golden.network(name) if name in UNETS else golden.classifier(name)


@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS])
def test_a_rewritten_network_is_the_same_function(name: str) -> None:
    network = plain(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    rewritten = rewrite(network)
    for t in ("t", "t_frac"):
        times = golden.load(name).tensor(t)
        assert relative(run(rewritten, name, times), run(network, name, times)) < golden.NETWORK_TOLERANCE
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not [m for m in rewritten.modules() if isinstance(m, RowLinear)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [*UNETS, *CLASSIFIERS])
def test_in_lower_precision_it_stays_close_and_depends_on_the_timestep(name: str, dtype: torch.dtype) -> None:
    network = plain(name)
    low = rewrite(network, dtype)
    for module in low.modules():
        if isinstance(module, nn.Conv2d) and not (isinstance(network, Classifier) and module.kernel_size == (1, 1)):
            assert module.weight.dtype == dtype
        elif isinstance(module, nn.Linear) and module in set(low.time_embed.modules()):
            assert module.weight.dtype == torch.float32
    for t in ("t", "t_frac"):
        times = golden.load(name).tensor(t)
        # random weights amplify every error: only trained networks meet the limits of an export
        limit = LOW[dtype] if golden.load(name).config["trained_on_toy_images"] else 3 * LOW[dtype]
        assert 1e-6 < relative(run(low, name, times), run(network, name, times)) < limit

    rows = len(golden.load(name).tensor("x"))
    outputs = [run(low, name, torch.full((rows,), t)) for t in (500.0, 500.25, 501.0, 998.0, 999.0)]
    for first, second in pairwise(outputs):
        assert not torch.equal(first, second)


def test_the_input_convolution_keeps_noise_of_the_size_of_rounding_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.003 * torch.randn(2, 1, 8, 8, generator=generator)  # the first of 4000 cosine timesteps
    conv = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    differences = torch.tensor([[0.0, 0, 0], [0, 1, -1], [0, 0, 0]])  # of horizontal neighbours
    conv.load_state_dict({"weight": differences[None, None], "bias": torch.zeros(1)})
    for x_0 in (-1.0, 0.7, 3.9):
        x_t = x_0 + noise
        expected = conv(x_t)[..., :-1]
        rounded = conv(x_t.to(torch.bfloat16).float())[..., :-1]
        split = InputConv2d(conv).to(torch.bfloat16)(x_t).float()[..., :-1]
        assert relative(rounded, expected) > 0.1
        assert relative(split, expected) < 0.02
    torch.testing.assert_close(InputConv2d(conv)(noise + 0.7), conv(noise + 0.7))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_linear_layers_are_given_tokens_that_torch_multiplies_as_one_matrix(name: str) -> None:
    # otherwise a gradient's graph contains copies of the weights, which OpenVINO computes wrongly (decision 7)
    tokens: list[Tensor] = []
    rewritten = rewrite(golden.classifier(name))
    for module in rewritten.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: tokens.extend(x for x in inputs if x.ndim == 3))
    run(rewritten, name, golden.load(name).tensor("t"))
    assert tokens
    assert all(x.is_contiguous() for x in tokens)


def test_a_head_that_no_golden_network_has_is_the_same_function() -> None:
    config = ClassifierConfig(
        image_size=8,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_classes=5,
        pool="spatial_v2",
    )
    classifier = random_classifier(config)
    x_t, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 100, 999])
    assert relative(rewrite(classifier)(x_t, t), classifier(x_t, t)) < golden.NETWORK_TOLERANCE


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("channels", [[32], [96], [40, 24], [64, 32]])
def test_normalisation_is_group_normalisation_of_maps_side_by_side(channels: list[int], mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(channels)
    norm = nn.GroupNorm(32, total).requires_grad_(False)
    norm.weight.copy_(torch.randn(total, generator=generator))
    norm.bias.copy_(torch.randn(total, generator=generator))
    x = torch.randn(2, total, 4, 4, generator=generator) + mean * torch.randn(total, 1, 1, generator=generator)
    scale, shift = torch.randn(2, 2, total, generator=generator)
    exact = copy.deepcopy(norm).double()(x.double())

    maps = [FeatureMap(part) for part in torch.split(x, channels, dim=1)]
    rewritten = InferenceNorm(norm)
    expected = 0.5 * (exact * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    actual = torch.cat(rewritten(maps, scale, shift, factor=0.5), dim=1)
    largest = max(float(values.abs().max()) for values in (x, exact, expected))
    tolerance = 16 * 2**-24 * largest  # a float32 rounding in each of some ten operations, on numbers up to this
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.cat(rewritten(maps), dim=1).double(), exact, rtol=0, atol=tolerance)


def test_silu_by_the_hyperbolic_tangent() -> None:
    v = torch.linspace(-30, 30, 1001)
    cancelled = 4 * 2**-24 * 15  # h + h tanh(h) is a difference of numbers up to 15, each rounded
    torch.testing.assert_close(silu_of_twice(v / 2), nn.functional.silu(v), rtol=1e-6, atol=cancelled)


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1)])
def test_the_gradient_of_a_convolution(kernel: int, stride: int, padding: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, kernel, kernel, generator=generator, dtype=torch.float64)
    out = nn.functional.conv2d(x, weight, stride=stride, padding=padding)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, x, grad)
    pair = [stride, stride], [padding, padding], [1, 1]
    actual, _, _ = _convolution_backward(grad, x, weight, None, *pair, False, [0, 0], 1, [True, False, False])
    torch.testing.assert_close(actual, expected)


def test_the_gradient_of_pooling() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = nn.functional.avg_pool2d(x, 2)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(_avg_pool2d_backward(grad, x, [2, 2]), expected)
