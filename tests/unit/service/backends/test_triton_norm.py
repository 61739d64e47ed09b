"""The Triton kernels of group normalisation, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.backends.cuda_network import group_norm
from service.backends.triton_norm import triton_group_norm


def expected(x: Tensor, groups: int, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute the normalisation with SiLU in float64."""
    values = [given.double() for given in (x, weight, bias, scale, shift)]
    h = F.group_norm(values[0], groups, values[1], values[2], 1e-5)
    return F.silu(h * (1 + values[3][:, :, None, None]) + values[4][:, :, None, None])


def arguments(batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(channels)
    x = 3 + 2 * torch.randn(batch, channels, *size, generator=draw)
    others = [torch.randn(channels, generator=draw) for _ in range(2)]
    both = torch.randn(batch, 2 * channels, generator=draw)  # scale and shift are parts of one array, with its stride
    return x.to(dtype, memory_format=torch.channels_last), *others, *both.chunk(2, dim=1)


@pytest.mark.parametrize(
    ("channels", "groups", "size"),
    [(32, 32, (8, 8)), (32, 8, (7, 7)), (96, 32, (4, 4)), (64, 1, (5, 3)), (12, 4, (33, 16)), (24, 8, (1, 1))],
)
def test_near_float64_for_all_shapes(channels: int, groups: int, size: tuple[int, int]) -> None:
    x, weight, bias, scale, shift = arguments(2, channels, size, torch.float32)
    out = triton_group_norm(x, groups, weight, bias, 1e-5, scale, shift, silu=True)
    torch.testing.assert_close(out.double(), expected(x, groups, weight, bias, scale, shift), rtol=1e-5, atol=2e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [True, False])
def test_equals_the_operations_of_pytorch_in_bfloat16(silu: bool) -> None:
    x, weight, bias, scale, shift = arguments(2, 48, (6, 6), torch.bfloat16)
    for given in ((), (scale, shift)):
        out, plain = (f(x, 16, weight, bias, 1e-5, *given, silu=silu) for f in (triton_group_norm, group_norm))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), plain.float(), rtol=8e-3, atol=8e-3)  # one rounding to bfloat16


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, weight, bias, scale, shift = arguments(3, 32, (9, 9), torch.float32)
    together = triton_group_norm(x, 8, weight, bias, 1e-5, scale, shift, silu=True)
    for k in range(3):
        row = x[k : k + 1].contiguous(memory_format=torch.channels_last)
        alone = triton_group_norm(row, 8, weight, bias, 1e-5, scale[[k]], shift[[k]], silu=True)
        assert torch.equal(alone[0], together[k])


def test_moments_of_a_distant_mean_are_exact() -> None:
    """The variance is that of centred values: E[x^2] - E[x]^2 would be noise."""
    x = (1e4 + torch.randn(1, 8, 40, 40, generator=torch.Generator().manual_seed(0))).to(
        memory_format=torch.channels_last
    )
    out = triton_group_norm(x, 4, torch.ones(8), torch.zeros(8), 1e-5, silu=False)
    exact = F.group_norm(x.double(), 4, eps=1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=5e-3)


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        triton_group_norm(torch.zeros(1, 4, 3, 3), 2, torch.ones(4), torch.zeros(4), 1e-5, silu=False)
