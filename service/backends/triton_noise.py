"""A Triton kernel of the counter-based noise: one launch instead of about 190 operations.

The words are those of `diffusion.noise`; the normals too, up to the last bit of the device's float64 functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusion.noise import ELEMENTS_PER_BLOCK

BLOCKS = 128
"""Philox blocks per program: 512 normals, 4 per thread of four warps."""
TURN = tl.constexpr(2.0**-32 * 2.0 * math.pi)
UNIT = tl.constexpr(2.0**-32)


@triton.jit  # type: ignore[untyped-decorator]
def normals_kernel(  # type: ignore[no-untyped-def]
    out,  # noqa: ANN001
    seeds,  # noqa: ANN001
    image_indices,  # noqa: ANN001
    steps,  # noqa: ANN001
    seed_stride,  # noqa: ANN001
    image_index_stride,  # noqa: ANN001
    step_stride,  # noqa: ANN001
    elements,  # noqa: ANN001
    STREAM: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803
) -> None:
    """Write the normals of some blocks of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    seed = tl.load(seeds + row * seed_stride)
    step = tl.load(steps + row * step_stride).to(tl.uint32)
    image_index = tl.load(image_indices + row * image_index_stride).to(tl.uint32)
    first, second, third, fourth = tl.philox(seed, block, step, image_index, STREAM)
    out += row * elements
    _store_pair(out, block * 4, elements, first, second)
    _store_pair(out, block * 4 + 2, elements, third, fourth)


@triton.jit  # type: ignore[untyped-decorator]
def _store_pair(out, element, elements, first, second) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Turn two words into two normals (Box & Muller 1958) and write them."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * UNIT))
    angle = (second.to(tl.float64) + 0.5) * TURN
    tl.store(out + element, (radius * tl.cos(angle)).to(tl.float32), mask=element < elements)
    tl.store(out + element + 1, (radius * tl.sin(angle)).to(tl.float32), mask=element + 1 < elements)


def triton_normal(
    seeds: Tensor, image_indices: Tensor, steps: Tensor, stream: int, shape: tuple[int, int, int]
) -> Tensor:
    """Return what `diffusion.noise.unchecked_normal` returns, computed by one kernel.

    Args:
        seeds: int64 [B].
        image_indices: int64 [B].
        steps: int64 [B].
        stream: the noise stream.
        shape: (C, H, W).
    """
    elements = math.prod(shape)
    out = torch.empty((len(seeds), *shape), dtype=torch.float32, device=seeds.device)
    grid = (len(seeds), triton.cdiv(elements, ELEMENTS_PER_BLOCK * BLOCKS))
    columns: tuple[Any, ...] = (seeds, image_indices, steps)
    # Triton launches on the current device. For a tensor on the CPU, this changes nothing
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # missing in its stubs
        normals_kernel[grid](
            out, *columns, *(column.stride(0) for column in columns), elements, STREAM=stream, BLOCKS=BLOCKS
        )
    return out
