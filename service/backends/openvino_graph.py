"""Compile an artifact's graph with OpenVINO for static batch sizes, and run it asynchronously in parallel parts.

The rows of a batch are split into parts. Threads that share a part synchronise after every layer, parts only at the
end of the call: see docs/decisions/0014.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from diffusion.network_inputs import NetworkInputs
from formats.precision import Precision
from service.backends.artifact_model import ArtifactGraph, FloatArray
from service.backends.openvino_core import openvino_core
from service.errors import ModelError

HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}
"""OpenVINO's names of the precisions that it supports on a CPU."""

LEAST_PART = 4
"""Minimum number of rows of a part. Smaller parts are as fast, but each stream costs 38 MB at any number of rows."""
MOST_PARTS = 4
"""Maximum number of parts of a call, for the same reason; on many cores, several threads share a part."""


class StaticGraph:
    """A graph of an artifact, compiled for the given batch sizes; the folder `cache` stores compiled graphs.

    Raises:
        ModelError: OpenVINO cannot compile it.
    """

    def __init__(
        self,
        artifact: ArtifactGraph,
        sizes: tuple[int, ...],
        precision: Precision,
        threads: int,
        cache: Path | None = None,
    ) -> None:
        self._artifact = artifact
        try:
            self._bound = _compile_all(artifact.graph, sizes, precision, threads, cache)
        except RuntimeError as error:
            raise ModelError(f"{artifact.graph}: OpenVINO cannot compile it: {error}") from error
        _return_freed_memory()

    def parts(self, rows: int) -> int:
        """Return the number of parts of a call of `rows` rows, which run in parallel."""
        return len(self._bound[rows].requests)

    def begin(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> InferCall:
        """Start the graph that was compiled for this many rows; the inputs are copied.

        Raises:
            ValueError: the inputs are not those that the graph reads.
        """
        feed = self._artifact.feed(inputs)
        bound = self._bound[len(inputs.x_t)]
        if len(feed) != len(bound.inputs):  # a missing input would keep its value of the previous call
            raise ValueError(f"the graph reads {', '.join(bound.inputs)}; got {', '.join(feed)}")
        bound.finish()  # wait for an abandoned call; if `wait` was called, it has raised the errors
        for name, value in feed.items():
            bound.inputs[name][...] = value
        return InferCall(bound)


class _BoundGraph:
    """A graph compiled for one batch size, with its own tensors; inputs are copied in, outputs are copied out.

    Copying takes a few microseconds; binding new arrays on every call takes hundreds in OpenVINO's Python layer. The
    graph is compiled for the rows of one part: each stream computes one part, in its slice of the tensors.
    """

    def __init__(self, compiled: openvino.CompiledModel, parts: int) -> None:
        buffers = {node: _memory_for(node, parts) for node in (*compiled.inputs, compiled.outputs[0])}
        self.requests = [compiled.create_infer_request() for _ in range(parts)]
        for node, values in buffers.items():
            for request, part in zip(self.requests, np.split(values, parts), strict=True):
                request.set_tensor(node, openvino.Tensor(part, shared_memory=True))
        self.inputs: dict[str, npt.NDArray[Any]] = {node.get_any_name(): buffers[node] for node in compiled.inputs}
        self.output: npt.NDArray[Any] = buffers[compiled.outputs[0]]

    def finish(self) -> list[RuntimeError]:
        """Wait until all parts have ended; return the errors that they raised."""
        raised = []
        for request in self.requests:
            try:
                request.wait()
            except RuntimeError as error:
                raised.append(error)
        return raised


class InferCall:
    """A running call of a graph, in OpenVINO's own threads."""

    def __init__(self, bound: _BoundGraph) -> None:
        self._bound = bound
        try:
            for request in bound.requests:
                request.start_async()
        except RuntimeError:
            bound.finish()
            raise

    def wait(self) -> FloatArray:
        """Wait for the call, which ends even if this raises; return a copy, as the next call overwrites the output."""
        if raised := self._bound.finish():
            raise raised.pop(0)  # a reference kept here would form a cycle, and keep the memory of the computation
        return self._bound.output.copy()

    @property
    def seconds(self) -> float:
        """Duration of the call as OpenVINO measured it, independent of when `wait` was called."""
        milliseconds: float = max(request.latency for request in self._bound.requests)
        return milliseconds / 1000


def equal_parts(rows: int, threads: int) -> int:
    """Return the number of equal parts of a call's rows, which OpenVINO's streams compute in parallel."""
    most = min(MOST_PARTS, rows // LEAST_PART)
    return max((parts for parts in range(1, most + 1) if rows % parts == 0 and threads % parts == 0), default=1)


def compile_settings(precision: Precision, streams: int, threads: int, cache: Path | None = None) -> dict[str, Any]:
    """Return OpenVINO's settings for compiling a graph; `threads` is the total of all streams."""
    return {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # replicas on one machine would be pinned to the same cores
        **({} if cache is None else {"CACHE_DIR": str(cache)}),
    }


def _compile_all(
    graph: Path, sizes: tuple[int, ...], precision: Precision, threads: int, cache: Path | None
) -> dict[int, _BoundGraph]:
    network = openvino_core().read_model(graph)
    usable = _usable_threads(threads)
    longest_first = sizes[::-1]
    with ThreadPoolExecutor(threads) as pool:  # reading a graph from the cache uses one thread
        bound = pool.map(lambda size: _compile(network, size, precision, usable, cache), longest_first)
        return dict(zip(longest_first, bound, strict=True))


def _compile(network: openvino.Model, size: int, precision: Precision, threads: int, cache: Path | None) -> _BoundGraph:
    """Compile a copy of a network for one batch size."""
    parts = equal_parts(size, threads)
    static = network.clone()
    static.reshape(
        {
            node.get_any_name(): [size // parts, *(e.get_length() for e in list(node.get_partial_shape())[1:])]
            for node in static.inputs
        }
    )
    compiled = openvino_core().compile_model(static, "CPU", compile_settings(precision, parts, threads, cache))
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != HINTS[precision]:
        raise ModelError(f"OpenVINO computes in {taken} on this processor, and not in {precision}; use precision fp32")
    return _BoundGraph(compiled, parts)


def _usable_threads(threads: int) -> int:
    """Return how many of the requested threads OpenVINO uses: it skips the second hardware thread of a core."""
    x = openvino.opset13.parameter([1], np.float32)
    model = openvino.Model([openvino.opset13.relu(x)], [x])
    compiled = openvino_core().compile_model(model, "CPU", compile_settings("fp32", 1, threads))
    usable: int = compiled.get_property("INFERENCE_NUM_THREADS")
    return usable


def _return_freed_memory() -> None:
    """Make glibc return the memory that compiling freed, tens of megabytes, to the system."""
    if sys.platform != "linux":
        return
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _memory_for(node: openvino.ConstOutput, parts: int) -> npt.NDArray[Any]:
    """Return zeroed memory for an input or output of all parts together."""
    rows, *shape = node.get_shape()
    return np.zeros((rows * parts, *shape), node.get_element_type().to_dtype())
