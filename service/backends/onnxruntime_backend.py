"""The `onnxruntime` backend: run an artifact's graphs in float32, at any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from diffusion.network_inputs import NetworkInputs, take_rows
from formats.precision import Precision
from service.backends.artifact_model import (
    ArtifactClassifier,
    FloatArray,
    cpu_threads,
    open_artifact,
    refuse_unfit_options,
    refuse_unfit_parity,
)
from service.backends.base import (
    BackendOptions,
    DenoiserDefaults,
    FailureKind,
    GuidingClassifier,
    synchronous_failure_kind,
)
from service.errors import ModelError

OUT_OF_MEMORY = "Failed to allocate memory"
"""Text of an allocation error; ONNX Runtime has no exception type for it."""


class OnnxRuntimeBackend(DenoiserDefaults[npt.NDArray[Any]]):
    """Implements `Denoiser` with numpy arrays on the CPU."""

    xp: Any = np
    device: Any = "cpu"

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        refuse_unfit_options("onnxruntime", options.device, options.torch_compile)
        if options.precision not in ("auto", "fp32"):
            raise ModelError(f"backend 'onnxruntime' computes in fp32; got precision '{options.precision}'")
        self._model = open_artifact(folder, "onnxruntime")
        if self._model.manifest.precision != "fp32":
            raise ModelError(f"{folder}: backend 'onnxruntime' needs an artifact exported with --precision fp32")
        refuse_unfit_parity(self._model, "onnxruntime", "fp32")
        self.config = self._model.config
        self.threads = cpu_threads(options.threads)
        self.batch_sizes: tuple[int, ...] | None = None
        self.precision: Precision = "fp32"
        self.description = f"onnxruntime {onnxruntime.__version__} cpu fp32"
        self.network_id = self._model.network_id(self.description)

        self._session = _open(self._model.graph, self.threads)
        classifier = self._model.classifier
        self.classifier: GuidingClassifier[npt.NDArray[Any]] | None = (
            None if classifier is None else OnnxRuntimeClassifier(classifier, self.threads)
        )

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Run the time MLP."""
        return self._model.time_mlp(t_model)

    def __call__(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> FloatArray:
        """Run the graph."""
        out: FloatArray = self._session.run(None, self._model.feed(inputs))[0]
        return out

    def failure_kind(self, error: Exception) -> FailureKind:
        """Distinguish lack of memory from other errors; calls are synchronous."""
        return FailureKind.OUT_OF_MEMORY if OUT_OF_MEMORY in str(error) else synchronous_failure_kind(error)


class OnnxRuntimeClassifier:
    """Implements `GuidingClassifier`, one row per call.

    In a batch, the last bits of a row's gradient depend on its place, because of ONNX Runtime's convolutions
    (docs/decisions/0007).
    """

    xp: Any = np
    device: Any = "cpu"

    def __init__(self, classifier: ArtifactClassifier, threads: int) -> None:
        self.config = classifier.config
        self.description = f"classifier, onnxruntime {onnxruntime.__version__} cpu fp32"
        self.batch_sizes: tuple[int, ...] | None = None
        self._classifier = classifier
        self._session = _open(classifier.graph, threads)

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Run the time MLP."""
        return self._classifier.time_mlp(t_model)

    def __call__(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> FloatArray:
        """Run the gradient graph on each row."""
        rows = [self._classifier.feed(take_rows(inputs, slice(k, k + 1))) for k in range(len(inputs.x_t))]
        return np.concatenate([self._session.run(None, row)[0] for row in rows])


def _open(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(f"{graph}: ONNX Runtime cannot load it: {error}") from error
