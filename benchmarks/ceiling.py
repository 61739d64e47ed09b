"""Measure the machine's ceiling: the rates of convolutions and matrix products alone.

On a CPU, 3x3 convolutions of 256 channels at 32x32, batch 8, by PyTorch (channels last), by OpenVINO, and by OpenVINO
in parts, as the service runs it; on a GPU the same at batch 256, and a product of two 8192 x 8192 matrices. A
precision's ceiling is the best of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.contenders import Place
from benchmarks.rounds import Timing
from formats.precision import Precision
from service.backends.torch_backend import DTYPES

CHANNELS, SIZE, KERNEL = 256, 32, 3
CPU_ROWS, CUDA_ROWS = 8, 256
IN_A_ROW = 4
"""Convolutions in one call, so that converting the input to a runtime's layout has little effect."""
MATRIX = 8192


@dataclass(frozen=True)
class Probe:
    """A workload that consists of the measured operation only."""

    name: str
    precision: Precision
    flops: int
    """Operations of one call; a multiply-add counts two."""
    call: Callable[[], Any]


def probes(precisions: set[Precision], place: Place) -> list[Probe]:
    """Return the probes of the precisions, ready to call."""
    made = []
    for precision in sorted(precisions):
        made.append(_torch_convolution(precision, place))
        if place.device.type == "cuda":
            made.append(_torch_product(precision, place))
        else:
            from service.backends.openvino_graph import equal_parts

            parts = {1, equal_parts(CPU_ROWS, place.threads)}
            made.extend(_openvino_convolution(precision, place, number) for number in sorted(parts))
    return made


def ceilings(made: list[Probe], timings: dict[str, Timing]) -> dict[Precision, float]:
    """Return the highest median rate of each precision's probes, in FLOP/s."""
    best: dict[Precision, float] = {}
    for probe in made:
        rate = probe.flops / timings[probe.name].median
        best[probe.precision] = max(rate, best.get(probe.precision, 0.0))
    return best


def _convolution_flops(rows: int) -> int:
    return IN_A_ROW * 2 * rows * SIZE * SIZE * CHANNELS * CHANNELS * KERNEL * KERNEL


def _weight(generator: np.random.Generator) -> Any:
    shape = (CHANNELS, CHANNELS, KERNEL, KERNEL)
    return generator.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(CHANNELS * KERNEL * KERNEL))


def _torch_convolution(precision: Precision, place: Place) -> Probe:
    generator = np.random.default_rng(0)
    rows = CUDA_ROWS if place.device.type == "cuda" else CPU_ROWS
    dtype = DTYPES[precision]
    x = torch.from_numpy(generator.standard_normal((rows, CHANNELS, SIZE, SIZE), dtype=np.float32))
    x = x.to(place.device, dtype).contiguous(memory_format=torch.channels_last)
    weights = [
        torch.from_numpy(_weight(generator)).to(place.device, dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(IN_A_ROW)
    ]

    @torch.inference_mode()
    def call() -> Any:
        h = x
        for weight in weights:
            h = F.conv2d(h, weight, padding=KERNEL // 2)
        place.wait()
        return h

    return Probe(f"convolution torch {precision}", precision, _convolution_flops(rows), call)


def _torch_product(precision: Precision, place: Place) -> Probe:
    generator = torch.Generator(place.device).manual_seed(0)
    a, b = (
        torch.randn(MATRIX, MATRIX, generator=generator, device=place.device).to(DTYPES[precision]) for _ in range(2)
    )

    @torch.inference_mode()
    def call() -> Any:
        out = a @ b
        place.wait()
        return out

    return Probe(f"product torch {precision}", precision, 2 * MATRIX**3, call)


def _openvino_convolution(precision: Precision, place: Place, parts: int) -> Probe:
    import openvino  # here: a GPU machine does without it

    from service.backends.openvino_core import openvino_core
    from service.backends.openvino_graph import compile_settings

    ops = openvino.opset13
    generator = np.random.default_rng(0)
    shape = [CPU_ROWS // parts, CHANNELS, SIZE, SIZE]
    parameter = ops.parameter(shape, np.float32)
    h, pad = parameter, [KERNEL // 2] * 2
    for _ in range(IN_A_ROW):
        h = ops.convolution(h, ops.constant(_weight(generator)), [1, 1], pad, pad, [1, 1])
    settings = compile_settings(precision, parts, place.threads)
    compiled = openvino_core().compile_model(openvino.Model([h], [parameter]), "CPU", settings)
    requests = [compiled.create_infer_request() for _ in range(parts)]
    for request in requests:
        request.set_input_tensor(openvino.Tensor(generator.standard_normal(shape, dtype=np.float32)))

    def call() -> Any:
        for request in requests:
            request.start_async()
        for request in requests:
            request.wait()
        return [request.get_output_tensor().data for request in requests]

    in_parts = "" if parts == 1 else f" in {parts} parts"
    return Probe(f"convolution openvino{in_parts} {precision}", precision, _convolution_flops(CPU_ROWS), call)
