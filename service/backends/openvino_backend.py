"""The `openvino` backend: an artifact's graph compiled for a few static batch sizes, in float32 or bfloat16.

Static shapes are worth a third more speed than one dynamic graph, and agree bit for bit among each other; dynamic and
static ones do not, so there is no dynamic fall-back. A call's rows are cut into parts, which need not wait for each
other.
"""

from __future__ import annotations

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from diffusion.artifact import GRADIENT_FILE, Precision
from service.backends.artifact_model import (
    ArtifactClassifier,
    ArtifactGraph,
    ArtifactModel,
    FloatArray,
    cpu_threads,
    open_artifact,
    refuse_unfit_options,
)
from service.backends.base import BackendOptions, FailureKind, GuidingClassifier, classify_synchronous
from service.backends.processor import has_bfloat16, vector_instructions
from service.errors import ModelError

HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}
"""How OpenVINO calls the precisions it has on a CPU."""

LEAST_PART = 4
"""Rows of a part at least. Smaller ones gain as much, but each stream costs 38 MB, whatever its rows."""
MOST_PARTS = 4
"""Of a call, for the same reason: on many cores, several threads share a part."""


class OpenVinoBackend:
    """Implements `Denoiser` with numpy arrays on the CPU."""

    xp: Any = np
    device: Any = "cpu"

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        refuse_unfit_options("openvino", options.device, options.torch_compile)
        self._model = open_artifact(folder, "openvino")
        precision = choose_precision(self._model, options.precision)
        self.config = self._model.config
        self.threads = cpu_threads(options.threads)
        self.description = f"openvino {_version()} cpu {precision} static parts"
        self.numerics_id = self._model.numerics_id(self.description)

        sizes = options.sizes_to_compile
        self.batch_sizes: tuple[int, ...] | None = sizes
        core = openvino.Core()
        if (cache := compile_cache(options.cache_dir)) is not None:
            core.set_property({"CACHE_DIR": str(cache)})
        self._network = _StaticGraph(core, self._model, sizes, precision, self.threads)
        classifier = self._model.classifier
        self.classifier: GuidingClassifier[npt.NDArray[Any]] | None = (
            None if classifier is None else OpenVinoClassifier(core, classifier, sizes, self.threads)
        )

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Run the time MLP."""
        return self._model.time_mlp(t_model)

    def __call__(self, x_t: FloatArray, emb_t: FloatArray, y: npt.NDArray[np.int64] | None) -> FloatArray:
        """Run the graph that was compiled for this many rows."""
        return self.begin(x_t, emb_t, y).wait()

    def begin(self, x_t: FloatArray, emb_t: FloatArray, y: npt.NDArray[np.int64] | None) -> InferCall:
        """Let the graph that was compiled for this many rows run."""
        return self._network.begin(x_t, emb_t, y)

    def classify(self, error: Exception) -> FailureKind:
        """Tell memory from the rest: the call is over when it returns."""
        return classify_synchronous(error)


class OpenVinoClassifier:
    """Implements `GuidingClassifier`; in float32, which the gradient's graph was exported and measured in."""

    xp: Any = np
    device: Any = "cpu"

    def __init__(
        self, core: openvino.Core, classifier: ArtifactClassifier, sizes: tuple[int, ...], threads: int
    ) -> None:
        measured = classifier.manifest.parity_of("openvino", "fp32", GRADIENT_FILE)
        if measured is None:
            raise ModelError(f"{classifier.graph.parent}: the manifest has no parity of openvino; export it again")
        self.config = classifier.config
        self.description = f"classifier, openvino {_version()} cpu fp32 static parts"
        self.batch_sizes: tuple[int, ...] | None = sizes
        self._classifier = classifier
        self._gradient = _StaticGraph(core, classifier, sizes, "fp32", threads)

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Run the time MLP."""
        return self._classifier.time_mlp(t_model)

    def __call__(self, x_t: FloatArray, emb_t: FloatArray, y: npt.NDArray[np.int64] | None) -> FloatArray:
        """Run the gradient's graph that was compiled for this many rows."""
        return self._gradient.begin(x_t, emb_t, y).wait()


class _BoundGraph:
    """A compiled graph for so many rows, with tensors of its own, which arrays are copied into and out of.

    Copying costs a few microseconds; handing arrays over with every call costs OpenVINO's Python layer hundreds. The
    graph was compiled for a part of the rows: each of its streams computes one, and reads and writes that part of the
    tensors.
    """

    def __init__(self, compiled: openvino.CompiledModel, parts: int) -> None:
        whole = {node: _memory_for(node, parts) for node in (*compiled.inputs, compiled.outputs[0])}
        self.requests = [compiled.create_infer_request() for _ in range(parts)]
        for node, values in whole.items():
            for request, part in zip(self.requests, np.split(values, parts), strict=True):
                request.set_tensor(node, openvino.Tensor(part, shared_memory=True))
        self.inputs: dict[str, npt.NDArray[Any]] = {node.get_any_name(): whole[node] for node in compiled.inputs}
        self.output: npt.NDArray[Any] = whole[compiled.outputs[0]]

    def finish(self) -> RuntimeError | None:
        """Wait until no part is being computed; returns what the first of those raised that did."""
        failed = None
        for request in self.requests:
            try:
                request.wait()
            except RuntimeError as error:
                failed = failed or error
        return failed


class InferCall:
    """A run of a graph, in OpenVINO's own threads."""

    def __init__(self, bound: _BoundGraph) -> None:
        self._bound = bound
        try:
            for request in bound.requests:
                request.start_async()
        except RuntimeError:
            bound.finish()
            raise

    def wait(self) -> FloatArray:
        """Return a copy of its output, which the next run writes over; where it raises, it is over nevertheless."""
        if (error := self._bound.finish()) is not None:
            raise error
        return self._bound.output.copy()

    @property
    def seconds(self) -> float:
        """What it took until it ended, as OpenVINO measured it, however late somebody came to wait for it."""
        milliseconds: float = max(request.latency for request in self._bound.requests)
        return milliseconds / 1000


class _StaticGraph:
    """A graph of an artifact, compiled for some batch sizes."""

    def __init__(
        self, core: openvino.Core, artifact: ArtifactGraph, sizes: tuple[int, ...], precision: Precision, threads: int
    ) -> None:
        self._artifact = artifact
        try:
            self._bound = _compile_all(core, artifact.graph, sizes, precision, threads)
        except RuntimeError as error:
            raise ModelError(f"{artifact.graph}: OpenVINO cannot compile it: {error}") from error
        _return_freed_memory()

    def begin(self, x_t: FloatArray, emb_t: FloatArray, y: npt.NDArray[np.int64] | None) -> InferCall:
        inputs = self._artifact.inputs(x_t, emb_t, y)
        bound = self._bound[len(x_t)]
        if len(inputs) != len(bound.inputs):  # what is not given would be what the call before was given
            raise ValueError(f"the graph reads {', '.join(bound.inputs)}; got {', '.join(inputs)}")
        bound.finish()  # a call that was begun and forgotten; one that raised has been told of
        for name, value in inputs.items():
            bound.inputs[name][...] = value
        return InferCall(bound)


def choose_precision(model: ArtifactModel, wanted: str) -> Precision:
    """Return what to compute in; `auto` is bfloat16 where the processor has it and the artifact vouches for it.

    Raises:
        ModelError: a precision that this backend does not have, or that the artifact's parity report does not cover.
    """
    precisions: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16"}
    if wanted == "auto":
        measured = model.manifest.parity_of("openvino", "bf16")
        good = measured is not None and measured.passed and has_bfloat16(vector_instructions())
        wanted = "bf16" if good or model.manifest.precision == "bf16" else "fp32"
    if wanted not in precisions:
        raise ModelError(f"backend 'openvino' computes in fp32 or bf16; got precision '{wanted}'")
    precision = precisions[wanted]
    measured = model.manifest.parity_of("openvino", precision)
    if measured is None:
        raise ModelError(
            f"{model.graph.parent}: the manifest has no parity of openvino in {precision}; export the checkpoint "
            f"again, with --precision fp32"
        )
    if not measured.passed:
        raise ModelError(
            f"{model.graph.parent}: openvino in {precision} is too far from PyTorch for this network: relative error "
            f"{measured.worst:.1e}, at most {measured.limit:.0e} is allowed; use precision fp32"
        )
    return precision


def equal_parts(rows: int, threads: int) -> int:
    """Return into how many equal parts a call's rows are cut, which OpenVINO's streams compute beside each other.

    Threads that share a part wait for each other after every layer, streams only at the end.
    """
    most = min(MOST_PARTS, rows // LEAST_PART)
    return max((parts for parts in range(1, most + 1) if rows % parts == 0 and threads % parts == 0), default=1)


def compile_cache(wanted: str | None) -> Path | None:
    """Return the folder for compiled graphs, which save most of the compile time at the next start.

    Args:
        wanted: a folder; "" for none; None for the user's cache folder, if it can be written to.

    Raises:
        ModelError: a folder that was asked for and cannot be written to.
    """
    if wanted == "":
        return None
    try:
        folder = Path(wanted) if wanted else _user_cache() / "iddpm" / "openvino"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        if wanted:
            raise ModelError(f"cache_dir cannot be used: {error}") from error
        return None
    return folder


def _version() -> str:
    return openvino.get_version().split("-")[0]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _compile_all(
    core: openvino.Core, graph: Path, sizes: tuple[int, ...], precision: Precision, threads: int
) -> dict[int, _BoundGraph]:
    network = core.read_model(graph)
    usable = _usable_threads(core, threads)
    with ThreadPoolExecutor(threads) as pool:  # from the cache, each is the work of one thread
        bound = pool.map(lambda size: _compile(core, network, size, precision, usable), sizes)
        return dict(zip(sizes, bound, strict=True))


def _compile(
    core: openvino.Core, network: openvino.Model, size: int, precision: Precision, threads: int
) -> _BoundGraph:
    """Compile a network for one batch size; the network itself is left as it is."""
    parts = equal_parts(size, threads)
    static = network.clone()
    static.reshape(
        {
            node.get_any_name(): [size // parts, *(e.get_length() for e in list(node.get_partial_shape())[1:])]
            for node in static.inputs
        }
    )
    settings = {**_settings(parts, threads), "INFERENCE_PRECISION_HINT": HINTS[precision]}
    return _BoundGraph(core.compile_model(static, "CPU", settings), parts)


def _usable_threads(core: openvino.Core, threads: int) -> int:
    """Return how many threads OpenVINO takes where so many are asked for: it leaves second threads of a core alone."""
    x = openvino.opset13.parameter([1], np.float32)
    model = openvino.Model([openvino.opset13.relu(x)], [x])
    usable: int = core.compile_model(model, "CPU", _settings(1, threads)).get_property("INFERENCE_NUM_THREADS")
    return usable


def _settings(streams: int, threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # replicas on one machine would be pinned to the same cores
    }


def _return_freed_memory() -> None:
    """Have glibc give back what compiling needed, tens of megabytes that it would keep."""
    if sys.platform != "linux":
        return
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _memory_for(node: openvino.ConstOutput, parts: int) -> npt.NDArray[Any]:
    """Return memory for so many times the rows of an input or output."""
    rows, *shape = node.get_shape()
    return np.zeros((rows * parts, *shape), node.get_element_type().to_dtype())
