"""Read the vector instruction sets of the processor, on which pixels depend, without importing torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

VECTOR_FLAGS = ("sse", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "fphp")
CPUINFO = Path("/proc/cpuinfo")

ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that limit oneDNN, which OpenVINO and PyTorch contain; the first one that is set takes precedence."""
LIMITS = (
    *ONEDNN_LIMITS,
    "ATEN_CPU_CAPABILITY",  # PyTorch's own kernels
    "MKL_ENABLE_INSTRUCTIONS",  # PyTorch's matrix products
    "NPY_DISABLE_CPU_FEATURES",
    "OPENBLAS_CORETYPE",  # numpy's matrix products
)
"""Environment variables that restrict a library to kernels for fewer instructions than the processor supports.

ONNX Runtime has no such variable, and neither has OpenVINO's copy of ONNX Runtime's matrix products.
"""
ONEDNN_WITHOUT_BFLOAT16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
"""Values of ONEDNN_MAX_CPU_ISA below the first instruction set with bfloat16 products."""


def vector_instructions(cpuinfo: Path = CPUINFO, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the machine's architecture, its vector instruction sets, and the variables that limit their use.

    On systems without /proc/cpuinfo, the system's name of its processor replaces the instruction sets.
    """
    limits = tuple(f"{name}={value}" for name, value in instruction_limits(environ).items())
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine(), platform.processor(), *limits
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return platform.machine(), *sorted(flag for flag in flags if flag.startswith(VECTOR_FLAGS)), *limits


def instruction_limits(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of `LIMITS` that are set, with their values."""
    return {name: environ[name] for name in LIMITS if environ.get(name)}


def has_bfloat16(instructions: tuple[str, ...]) -> bool:
    """Return whether the processor has instructions for bfloat16 products (not emulation) that oneDNN may use."""
    if {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}.isdisjoint(instructions):
        return False
    limits = dict(entry.split("=", 1) for entry in instructions if "=" in entry)
    of_onednn = next((limits[name] for name in ONEDNN_LIMITS if name in limits), "")
    return of_onednn.lower() not in ONEDNN_WITHOUT_BFLOAT16
