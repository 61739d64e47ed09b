"""Run the Triton code that Inductor writes for the fused noise and update in Triton's interpreter, on the CPU.

python -m tests.interpret_update prints the largest difference of the noise and of x_prev from the plain operations. Run
as a process of its own: it replaces the driver of Triton and its mathematical functions.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from typing import Any

import torch
import triton.language as tl
import typer
from torch import Tensor
from torch._inductor.runtime.triton_helpers import libdevice  # type: ignore[attr-defined]
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from diffusion.config import DiffusionConfig
from diffusion.noise import STREAM_STEP, unchecked_normal
from diffusion.plans import build_plan
from service.backends.compiling import compile_per_shape
from service.engine.runners.step import add_noise_and_advance

SHAPE = (1, 8, 8)
ROWS = 3


class StandIn(DriverBase):  # type: ignore[misc]  # Triton ships no types
    """A driver that names a GPU and computes on the CPU."""

    @staticmethod
    def is_active() -> bool:
        """Return whether the driver can be used."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Name the GPU for which Inductor writes code."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the only stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        """Nothing is timed."""

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the type itself: no launcher is compiled."""
        return ty


def noise_and_update(lines: Tensor, arrays: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noise of a step, and x_prev."""
    noise = unchecked_normal(rows, rows, rows, STREAM_STEP, SHAPE)
    x_t, x0_prev, out, var_values = arrays
    step = add_noise_and_advance(lines, x_t, x0_prev, out, var_values, (rows, rows, rows), None)
    return noise, step.x_prev


def main() -> None:
    """Compile, run, and print the differences."""
    driver.set_active(StandIn())
    for name in ("log", "sqrt", "cos", "sin", "exp"):  # the interpreter has no library of the device
        function: Any = lambda x, name=name: getattr(tl, name)(x)  # noqa: E731  # the interpreter replaces tl's members
        setattr(libdevice, name, function)
    plan = build_plan(DiffusionConfig(num_timesteps=1000), "ancestral", "4")
    draw = torch.Generator().manual_seed(0)
    arrays = [torch.randn(ROWS, *SHAPE, generator=draw) for _ in range(4)]
    given = torch.from_numpy(plan.table[:ROWS].copy()), arrays, torch.arange(ROWS)
    options = {"cpu_backend": "triton", "constant_and_index_propagation": False, "compile_threads": 1}
    with torch.inference_mode():
        fused = compile_per_shape(noise_and_update, 1, options)(*given)
        plain = noise_and_update(*given)
    differences = [float((a - b).abs().max()) for a, b in zip(fused, plain, strict=True)]
    typer.echo(" ".join(map(str, differences)))


if __name__ == "__main__":
    main()
