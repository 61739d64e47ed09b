"""What the processor offers to kernels: part of what pixels depend on, without asking torch."""

from __future__ import annotations

import platform
from pathlib import Path

VECTOR_FLAGS = ("sse", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "fphp")
CPUINFO = Path("/proc/cpuinfo")


def vector_instructions(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """Return the machine's architecture and the vector instruction sets that a runtime may choose kernels by.

    On systems without /proc/cpuinfo, the architecture and what the system calls its processor.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return (platform.machine(), *sorted(flag for flag in flags if flag.startswith(VECTOR_FLAGS)))


def has_bfloat16(instructions: tuple[str, ...]) -> bool:
    """Say whether bfloat16 products are instructions, not emulated."""
    return not {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}.isdisjoint(instructions)
