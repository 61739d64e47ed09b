"""Triton kernels of group normalisation with its activation, on feature maps stored channels-last.

PyTorch's own group normalisation on a CUDA device converts such maps to float32 and to channels-first. Here a map is
read twice and written once, in its own precision; moments are float32. A row's result depends only on the row and the
map's shape: sums are divided by the shape, never by the batch size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_PIXELS = 32
TILE_CHANNELS = 64
"""A tile holds about this many pixels and channels: 2,048 elements, 16 per thread of four warps."""
MOST_PARTS = 32
"""A map is divided into at most this many parts, each summed by one program per block of channels."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile(pixel, pixels, group, groups, group_size, BLOCK_S: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]  # noqa: ANN001, N803
    """Return offsets into a map [pixels, channels], and which of them exist, for pixels x groups x group members."""
    member = tl.arange(0, BLOCK_S)
    channel = group[:, None] * group_size + member[None, :]
    exists = (group[:, None] < groups) & (member[None, :] < group_size)
    offsets = pixel[:, None, None] * (groups * group_size) + channel[None, :, :]
    return offsets, (pixel[:, None, None] < pixels) & exists[None, :, :]


@triton.jit  # type: ignore[untyped-decorator]
def moments_kernel(  # type: ignore[no-untyped-def]
    x,  # noqa: ANN001
    means,  # noqa: ANN001
    squares,  # noqa: ANN001
    pixels,  # noqa: ANN001
    groups,  # noqa: ANN001
    group_size,  # noqa: ANN001
    PART: tl.constexpr,  # noqa: N803
    BLOCK_P: tl.constexpr,  # noqa: N803
    BLOCK_G: tl.constexpr,  # noqa: N803
    BLOCK_S: tl.constexpr,  # noqa: N803
) -> None:
    """Write the mean and the sum of squared deviations of each group in one part of an image's pixels."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    x += image * pixels * groups * group_size
    mean = tl.zeros([BLOCK_G], tl.float32)
    square = tl.zeros([BLOCK_G], tl.float32)
    seen = 0.0
    for start in range(0, PART, BLOCK_P):
        first = part * PART + start
        offsets, exists = _tile(first + tl.arange(0, BLOCK_P), pixels, group, groups, group_size, BLOCK_S)
        values = tl.load(x + offsets, mask=exists, other=0.0).to(tl.float32)
        count = (tl.maximum(tl.minimum(pixels - first, BLOCK_P), 0) * group_size).to(tl.float32)
        total = tl.maximum(seen + count, 1.0)
        tile_mean = tl.sum(tl.sum(values, axis=2), axis=0) / tl.maximum(count, 1.0)
        centred = tl.where(exists, values - tile_mean[None, :, None], 0.0)
        difference = tile_mean - mean
        # Chan et al. 1979: moments of a union of two samples
        square += tl.sum(tl.sum(centred * centred, axis=2), axis=0) + difference * difference * (seen * count / total)
        mean += difference * (count / total)
        seen += count
    place = (image * tl.num_programs(1) + part) * groups + group
    tl.store(means + place, mean, mask=group < groups)
    tl.store(squares + place, square, mask=group < groups)


@triton.jit  # type: ignore[untyped-decorator]
def normalise_kernel(  # type: ignore[no-untyped-def]
    x,  # noqa: ANN001
    out,  # noqa: ANN001
    means,  # noqa: ANN001
    squares,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    scale,  # noqa: ANN001
    shift,  # noqa: ANN001
    scale_stride,  # noqa: ANN001
    pixels,  # noqa: ANN001
    groups,  # noqa: ANN001
    group_size,  # noqa: ANN001
    eps,  # noqa: ANN001
    SCALED: tl.constexpr,  # noqa: N803
    SILU: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    BLOCK_PARTS: tl.constexpr,  # noqa: N803
    PART: tl.constexpr,  # noqa: N803
    BLOCK_P: tl.constexpr,  # noqa: N803
    BLOCK_G: tl.constexpr,  # noqa: N803
    BLOCK_S: tl.constexpr,  # noqa: N803
) -> None:
    """Normalise one part of an image's pixels with the moments of all its parts."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    parts = tl.arange(0, BLOCK_PARTS)
    place = (image * PARTS + parts[:, None]) * groups + group[None, :]
    exists = (parts[:, None] < PARTS) & (group[None, :] < groups)
    part_mean = tl.load(means + place, mask=exists, other=0.0)
    part_square = tl.load(squares + place, mask=exists, other=0.0)
    count = (tl.maximum(tl.minimum(pixels - parts * PART, PART), 0) * group_size).to(tl.float32)[:, None]
    total = tl.sum(count, axis=0)
    mean = tl.sum(part_mean * count, axis=0) / total
    difference = part_mean - mean[None, :]
    variance = tl.sum(part_square + difference * difference * count, axis=0) / total
    factor = 1.0 / tl.sqrt(variance + eps)

    member = tl.arange(0, BLOCK_S)
    channel = group[:, None] * group_size + member[None, :]
    used = (group[:, None] < groups) & (member[None, :] < group_size)
    a = tl.load(weight + channel, mask=used, other=0.0).to(tl.float32) * factor[:, None]
    b = tl.load(bias + channel, mask=used, other=0.0).to(tl.float32)
    if SCALED:
        gain = 1.0 + tl.load(scale + image * scale_stride + channel, mask=used, other=0.0)
        a *= gain
        b = b * gain + tl.load(shift + image * scale_stride + channel, mask=used, other=0.0)
    x += image * pixels * groups * group_size
    out += image * pixels * groups * group_size
    for start in range(0, PART, BLOCK_P):
        pixel = part * PART + start + tl.arange(0, BLOCK_P)
        offsets, stored = _tile(pixel, pixels, group, groups, group_size, BLOCK_S)
        values = tl.load(x + offsets, mask=stored, other=0.0).to(tl.float32)
        y = (values - mean[None, :, None]) * a[None, :, :] + b[None, :, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=stored)


def triton_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    silu: bool,
) -> Tensor:
    """Return `cuda_network.group_norm`'s result, computed by two kernels.

    Args:
        x: [B, C, H, W], stored channels-last.
        groups: number of groups; divides C.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        scale: float32 [B, C] with unit stride along C; None: no scale and shift.
        shift: as scale, with the same strides.
        silu: whether SiLU follows.

    Raises:
        ValueError: x is not stored channels-last.
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"a feature map must be stored channels-last; got strides {x.stride()}")
    batch, channels, height, width = x.shape
    pixels, group_size = height * width, channels // groups
    block_s = triton.next_power_of_2(group_size)
    block_g = max(1, min(triton.next_power_of_2(groups), TILE_CHANNELS // block_s))
    block_p = max(1, TILE_PIXELS * TILE_CHANNELS // (block_s * block_g))
    part = max(block_p, triton.next_power_of_2(triton.cdiv(pixels, MOST_PARTS)))
    parts = triton.cdiv(pixels, part)
    means, squares = torch.empty(2, batch, parts, groups, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    grid = (batch, parts, triton.cdiv(groups, block_g))
    shape = {"PART": part, "BLOCK_P": block_p, "BLOCK_G": block_g, "BLOCK_S": block_s}
    scaled = scale is not None and shift is not None
    # Triton launches on the current device. For a tensor on the CPU, this changes nothing
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # missing in its stubs
        moments_kernel[grid](x, means, squares, pixels, groups, group_size, **shape)
        normalise_kernel[grid](
            *(x, out, means, squares, weight, bias),
            *((scale, shift, scale.stride(0)) if scale is not None and shift is not None else (x, x, 0)),
            *(pixels, groups, group_size, eps),
            SCALED=scaled,
            SILU=silu,
            PARTS=parts,
            BLOCK_PARTS=triton.next_power_of_2(parts),
            **shape,
        )
    return out
