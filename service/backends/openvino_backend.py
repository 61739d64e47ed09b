"""The `openvino` backend: run an artifact's graph, compiled for a few static batch sizes, in float32 or bfloat16.

Static shapes are a third faster than one dynamic graph, and their results are bit-identical to each other. Dynamic and
static shapes are not, so there is no dynamic fallback. `service.backends.openvino_graph` compiles and runs the graphs.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from diffusion.network_inputs import NetworkInputs
from formats.precision import Precision
from service.backends.artifact_model import (
    ArtifactClassifier,
    ArtifactModel,
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
from service.backends.batch_sizes import up_to_width
from service.backends.openvino_core import openvino_core
from service.backends.openvino_graph import InferCall, StaticGraph
from service.backends.processor import has_bfloat16, vector_instructions
from service.errors import ModelError

log = logging.getLogger(__name__)


class OpenVinoBackend(DenoiserDefaults[npt.NDArray[Any]]):
    """Implements `Denoiser` with numpy arrays on the CPU."""

    xp: Any = np
    device: Any = "cpu"

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        refuse_unfit_options("openvino", options.device, options.torch_compile)
        self._model = open_artifact(folder, "openvino")
        precision = choose_precision(self._model, options.precision)
        self.config = self._model.config
        self.threads = cpu_threads(options.threads)
        self.precision = precision
        self.description = f"openvino {_version()} cpu {precision} static parts"
        self.network_id = self._model.network_id(self.description)

        sizes = options.batch_sizes or up_to_width(self._model.manifest.buckets, options.max_rows)
        self.batch_sizes: tuple[int, ...] | None = sizes
        cache = compile_cache(options.cache_dir)
        self.graph = StaticGraph(self._model, sizes, precision, self.threads, cache)
        classifier = self._model.classifier
        self.classifier: GuidingClassifier[npt.NDArray[Any]] | None = (
            None if classifier is None else OpenVinoClassifier(classifier, sizes, self.threads, cache)
        )

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Run the time MLP."""
        return self._model.time_mlp(t_model)

    def __call__(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> FloatArray:
        """Run the graph that was compiled for this many rows."""
        return self.begin(inputs).wait()

    def begin(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> InferCall:
        """Start the graph that was compiled for this many rows."""
        return self.graph.begin(inputs)

    def failure_kind(self, error: Exception) -> FailureKind:
        """Distinguish lack of memory from other errors; a call ends with its `wait`."""
        return synchronous_failure_kind(error)


class OpenVinoClassifier:
    """Implements `GuidingClassifier` in float32, the precision in which its graph was exported and measured."""

    xp: Any = np
    device: Any = "cpu"

    def __init__(
        self, classifier: ArtifactClassifier, sizes: tuple[int, ...], threads: int, cache: Path | None = None
    ) -> None:
        refuse_unfit_parity(classifier, "openvino", "fp32")
        self.config = classifier.config
        self.description = f"classifier, openvino {_version()} cpu fp32 static parts"
        self.batch_sizes: tuple[int, ...] | None = sizes
        self._classifier = classifier
        self._gradient = StaticGraph(classifier, sizes, "fp32", threads, cache)

    def embed_timesteps(self, t_model: FloatArray) -> FloatArray:
        """Run the time MLP."""
        return self._classifier.time_mlp(t_model)

    def __call__(self, inputs: NetworkInputs[npt.NDArray[Any]]) -> FloatArray:
        """Run the gradient graph that was compiled for this many rows."""
        return self._gradient.begin(inputs).wait()


def choose_precision(model: ArtifactModel, wanted: str) -> Precision:
    """Return the precision to use; `auto` is bfloat16 if the processor has it and the artifact's parity in it passed.

    Raises:
        ModelError: the backend lacks the precision, or the artifact has no passed parity measurement in it.
    """
    precisions: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16"}
    if wanted == "auto":
        measured = model.manifest.parity_of("openvino", "bf16")
        fast = bfloat16_is_fast()
        if fast and measured is None:
            log.warning(
                "%s: float32, because the manifest has no parity of openvino in bf16; export the checkpoint again on a "
                "processor with bf16, such as this one",
                model.graph.parent,
            )
        good = fast and measured is not None and measured.passed
        wanted = "bf16" if good or model.manifest.precision == "bf16" else "fp32"
    if wanted not in precisions:
        raise ModelError(f"backend 'openvino' computes in fp32 or bf16; got precision '{wanted}'")
    precision = precisions[wanted]
    refuse_unfit_parity(model, "openvino", precision)
    return precision


def bfloat16_is_fast() -> bool:
    """Return whether the processor has instructions for bfloat16 products and OpenVINO uses them."""
    return has_bfloat16(vector_instructions()) and "BF16" in openvino_core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )


def compile_cache(wanted: str | None) -> Path | None:
    """Return the folder for compiled graphs, which save most of the compile time at the next start.

    Args:
        wanted: a folder; "" for no cache; None for the user's cache folder if it is writable, else no cache.

    Raises:
        ModelError: the configured folder is not writable.
    """
    if wanted == "":
        return None
    try:
        folder = Path(wanted) if wanted else _user_cache() / "iddpm" / "openvino"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        if wanted:
            raise ModelError(f"cache_dir cannot be used: {error}") from error
        return None
    return folder


def _version() -> str:
    return openvino.get_version().split("-")[0]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
