"""The runtimes in which an exported graph is tested before it is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from formats.precision import Precision
from model_export.library_errors import LibraryError, library_call

if TYPE_CHECKING:  # imported where they are used: a GPU machine does without them
    import openvino

Arrays = Mapping[str, npt.NDArray[Any]]
Graph = Callable[[Arrays], npt.NDArray[np.float32]]
"""Inputs by name, any number of rows -> the graph's only output. Exceptions of the runtime become LibraryError."""

HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}
"""OpenVINO's names of precisions."""


class PrecisionUnavailable(Exception):
    """A runtime does not compute in the requested precision on this processor; the message gives the reason."""


@dataclass(frozen=True)
class Runtime:
    """A runtime with a precision."""

    backend: str
    """Name and version."""
    precision: Precision
    open: Callable[[Path], Graph]
    """Open a graph; raises `PrecisionUnavailable` if another precision would be in effect."""


def runtimes_for(precision: Precision) -> list[Runtime]:
    """Return the runtimes in which a graph of a precision is tested on this machine.

    The CPU runtimes serve float32 graphs; OpenVINO also converts them to bfloat16.
    Graphs of lower precision are for TensorRT, which needs a GPU; here they are tested in the runtime that supports
    their types: ONNX Runtime has no bfloat16 on a CPU, and OpenVINO converts float16 to float32. ONNX Runtime keeps
    some values between two float16 operations in float32, so an overflow may occur on a GPU only: engines are measured
    again.
    """
    onnx_runtime = Runtime(_onnxruntime_version(), precision, _open_onnxruntime)
    in_fp32, in_bf16 = (Runtime(_openvino_version(), p, _openvino(p)) for p in HINTS)
    return {"fp32": [onnx_runtime, in_fp32, in_bf16], "bf16": [in_bf16], "fp16": [onnx_runtime]}[precision]


@cache
def _onnxruntime_version() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@cache
def _openvino_version() -> str:
    import openvino

    return f"openvino {openvino.get_version().split('-')[0]}"


def _open_onnxruntime(path: Path) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Exception: its exceptions have no common base class
    with library_call(_onnxruntime_version(), f"load {path.name}", Exception):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Arrays) -> npt.NDArray[np.float32]:
        with library_call(_onnxruntime_version(), f"run {path.name}", Exception):
            return session.run(None, dict(inputs))[0]

    return run


def _openvino(precision: Precision) -> Callable[[Path], Graph]:
    """Return a function that opens a graph as the service does: compiled for each batch size it is called with."""

    def open_graph(path: Path) -> Graph:
        compiled: dict[int, openvino.CompiledModel] = {}

        def run(inputs: Arrays) -> npt.NDArray[np.float32]:
            rows = len(inputs["x_t"])
            if rows not in compiled:
                shapes = {name: list(values.shape) for name, values in inputs.items()}
                compiled[rows] = _compile(path, shapes, precision)
            with library_call(_openvino_version(), f"run {path.name}", RuntimeError):
                return compiled[rows](dict(inputs))[0].copy()

        return run

    return open_graph


@cache
def _openvino_core() -> openvino.Core:
    """Return this process's core, which is never destroyed (reason in service/backends/openvino_core.py)."""
    import openvino

    return openvino.Core()


def _compile(path: Path, shapes: Mapping[str, list[int]], precision: Precision) -> openvino.CompiledModel:
    """Compile a graph in a precision.

    Raises:
        LibraryError: OpenVINO cannot compile it.
        PrecisionUnavailable: OpenVINO compiles it, but not in this precision. OpenVINO ignores a precision hint that
            the processor does not support; with limited instruction sets (ONEDNN_MAX_CPU_ISA), compiling in the lower
            precision fails.
    """

    def compiled_in(wanted: Precision) -> openvino.CompiledModel:
        settings = {"INFERENCE_PRECISION_HINT": HINTS[wanted], "PERFORMANCE_HINT": "LATENCY"}
        with library_call(_openvino_version(), f"compile {path.name}", RuntimeError):
            network = _openvino_core().read_model(path)
            network.reshape(shapes)
            return _openvino_core().compile_model(network, "CPU", settings)

    try:
        compiled = compiled_in(precision)
    except LibraryError as error:
        if precision == "fp32":
            raise
        compiled_in("fp32")  # raises if the graph is the cause
        raise PrecisionUnavailable(f"OpenVINO compiles this graph in fp32 only on this processor ({error})") from error
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != HINTS[precision]:
        raise PrecisionUnavailable(f"OpenVINO computes in {taken} on this processor, and not in {precision}")
    return compiled
