"""Compile the Triton kernels for GPUs that are not there: python -m tests.compile_kernels; prints a line per binary.

Run as a process of its own: tests load Triton with its interpreter, in which kernels cannot be compiled.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from service.backends.triton_noise import BLOCKS, TURN, normals_kernel
from service.backends.triton_norm import moments_kernel, normalise_kernel

FLOAT64 = re.compile(r"dense<([-+.\dE]+)> : tensor<\d+xf64>")
ARCHITECTURES = (80, 90, 120)
TILE = {"PART": 64, "BLOCK_P": 32, "BLOCK_G": 4, "BLOCK_S": 16}
NOISE = {
    "out": "*fp32",
    **dict.fromkeys(("seeds", "image_indices", "steps"), "*i64"),
    **dict.fromkeys(("seed_stride", "image_index_stride", "step_stride", "elements"), "i32"),
}


def kernels() -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Return kernels with the types of their arguments and their constants."""
    found: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (normals_kernel, NOISE, {"STREAM": stream, "BLOCKS": BLOCKS}) for stream in (0, 1)
    ]
    # Triton makes an argument that is 1 a constant
    for dtype, ones in (("bf16", ()), ("fp16", ("pixels",)), ("fp32", ("pixels", "group_size"))):
        integers = {name: "i32" for name in ("pixels", "groups", "group_size") if name not in ones}
        moments = {"x": f"*{dtype}", "means": "*fp32", "squares": "*fp32"}
        found.append((moments_kernel, moments | integers, TILE | dict.fromkeys(ones, 1)))
        for scaled, silu in ((False, False), (True, True)):
            affine = dict.fromkeys(("weight", "bias"), "*fp32")
            modulation = dict.fromkeys(("scale", "shift"), "*fp32" if scaled else f"*{dtype}")
            others = {"out": f"*{dtype}", **moments, **affine, **modulation, "scale_stride": "i32", "eps": "fp32"}
            constants = {**TILE, "SCALED": scaled, "SILU": silu, "PARTS": 5, "BLOCK_PARTS": 8}
            found.append((normalise_kernel, others | integers, constants | dict.fromkeys(ones, 1)))
    return found


def compile_all() -> None:
    """Compile every kernel for every architecture.

    Raises:
        ValueError: a constant of the noise was rounded to float32, or offsets of images are computed in 32 bits.
    """
    for architecture, (kernel, types, constants) in itertools.product(ARCHITECTURES, kernels()):
        ordered = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, ordered, constants), target=GPUTarget("cuda", architecture, 32))
        code = made.asm["ttir"]
        if kernel is normals_kernel and float(TURN.value) not in map(float, FLOAT64.findall(code)):
            raise ValueError("the factor of the angle is not in the code")
        if "extsi" not in code:
            raise ValueError("offsets of images must be computed in 64 bits")
        typer.echo(f"{architecture} {kernel.__name__} {len(made.asm['cubin'])}")


if __name__ == "__main__":
    compile_all()
