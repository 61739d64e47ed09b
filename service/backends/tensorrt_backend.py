"""The `tensorrt` backend: run an artifact's engines, one per batch size, in the graphs of captured steps.

The calls of real engines have never been run; tests without a GPU cover everything else (docs/tensorrt.md).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.config import CheckpointConfig, ModelConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_X_T, normal
from diffusion.respacing import respace
from formats.artifact import ArtifactError, Manifest
from formats.precision import PrecisionChoice
from formats.tensorrt_files import (
    EngineRecord,
    EngineRejected,
    Target,
    Wanted,
    engine_store,
    graph_sha256,
    read_engine,
    unusable_engines,
)
from formats.tensorrt_package import EngineError, Flavour, installed_flavour
from service.backends.artifact_model import ArtifactModel, open_artifact
from service.backends.base import BackendOptions, DenoiserDefaults, FailureKind, GuidingClassifier
from service.backends.batch_sizes import covering_width
from service.backends.cuda_errors import cuda_failure_kind
from service.backends.cuda_graphs import EmbNetwork
from service.backends.cuda_queue import CudaQueue, fastest_normal
from service.backends.tensorrt_engines import OUTPUT, EngineNetwork, Shapes
from service.backends.torch_backend import choose_device
from service.errors import ModelError

log = logging.getLogger(__name__)


class TensorRTBackend(DenoiserDefaults[Tensor]):
    """Implements `Denoiser` on a CUDA device, with the package `tensorrt` or `tensorrt_rtx`."""

    xp: Any = torch
    threads = 0

    def __init__(self, folder: Path, options: BackendOptions | None = None) -> None:
        """Load the engines of an artifact for the GPU of this machine, and test each.

        Args:
            folder: an artifact, or a checkpoint folder with one inside.
            options: `max_rows` determines the batch sizes. Missing engines are built only if `build_engines` is set.

        Raises:
            ModelError: TensorRT or a GPU is missing, or the artifact or an engine is unusable; the message gives the
                reason and the cure.
        """
        options = options or BackendOptions()
        model = open_artifact(folder, "tensorrt")
        _refuse_precision(model, options.precision)
        artifact, manifest = model.graph.parent, model.manifest
        self.config = model.config
        self.classifier: GuidingClassifier[Tensor] | None = None
        if model.classifier is not None:
            log.warning("%s: backend 'tensorrt' runs no classifiers; classifier_scale will be refused", artifact)
        flavour = _flavour()
        self.device = _cuda_device(options.device)
        trt = importlib.import_module(flavour)
        capability, gpu = torch.cuda.get_device_capability(self.device), torch.cuda.get_device_name(self.device)
        target = Target.of_device(flavour, str(trt.__version__), capability, gpu)
        self.wanted = Wanted(target, manifest.precision, graph_sha256(manifest.files))
        """The target, precision and graph that the engines must have been built for."""
        self.store = engine_store(artifact, self.wanted.onnx_sha256, options.engines_dir)
        """The folder of the engines."""
        sizes = covering_width(manifest.buckets, options.max_rows)
        engines = load_engines(artifact, self.store, self.wanted, sizes, options, self.device)

        with torch.cuda.device(self.device):
            network = EngineNetwork(trt, self.device)
            for size, (_, plan) in engines.items():
                network.load(plan, size, graph_shapes(self.config.model, size))
            # not the default stream, which cannot be captured
            graphs = network.capturable(torch.cuda.Stream(self.device).cuda_stream)  # type: ignore[no-untyped-call]
            if not graphs:
                log.warning("%s: these engines cannot be captured in CUDA graphs; running without", target.name)
            self._run: EmbNetwork = network
            normal = fastest_normal(self.device)
            if graphs:  # the runner captures whole steps
                self.queue = CudaQueue(self.device, network, None, fuses=options.fuse_update, normal=normal)

        self.batch_sizes: tuple[int, ...] | None = sizes
        self.time_mlp = model.time_mlp
        self.precision = manifest.precision
        words = [flavour, target.version, "cuda", gpu, manifest.precision]
        self.description = " ".join(words if graphs else [*words, "without graphs"])
        records = {size: record for size, (record, _) in engines.items()}
        kernels: dict[str, object] = {"noise": normal.__name__} if graphs else {}
        self.network_id = network_id(self.description, manifest, records, self.device, kernels)
        for size in sizes:
            refuse_unequal_rows(self._run, self.embed_timesteps, self.config, size, self.device)

    def embed_timesteps(self, t_model: Tensor) -> Tensor:
        """Run the time MLP, on the CPU."""
        return torch.from_numpy(self.time_mlp(t_model.cpu().numpy())).to(t_model.device)

    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Run the engine of the batch's size."""
        return self._run(inputs)

    def failure_kind(self, error: Exception) -> FailureKind:
        """Return the kind; errors of the device are of kind DEVICE."""
        return cuda_failure_kind(error)


def load_engines(
    artifact: Path,
    store: Path,
    wanted: Wanted,
    sizes: tuple[int, ...],
    options: BackendOptions,
    device: torch.device,
) -> dict[int, tuple[EngineRecord, bytes]]:
    """Read the engines of the batch sizes; if `options.build_engines` is set, build those that are unusable first.

    Returns:
        The record of each engine and its verified bytes, by batch size.

    Raises:
        ModelError: engines are missing, damaged, stale or built for another target; the message gives the reason for
            each and the command that builds them.
    """
    if options.build_engines is not None and (lacking := unusable_engines(store, wanted, sizes)):
        try:
            with torch.cuda.device(device):
                options.build_engines(artifact, store, wanted.target, tuple(lacking))
        except (EngineError, ArtifactError) as error:
            raise ModelError(str(error)) from error
        except OSError as error:
            cure = "set engines_dir (IDDPM_ENGINES_DIR) to a folder that the service may write"
            raise ModelError(f"engines cannot be written: {error}; {cure}") from error
    engines: dict[int, tuple[EngineRecord, bytes]] = {}
    errors: list[EngineError] = []
    for size in sizes:
        try:
            engines[size] = read_engine(store, wanted, size)
        except EngineError as error:
            errors.append(error)
    if errors:
        lines = [str(error) for error in errors]
        if not any(isinstance(error, EngineRejected) for error in errors):  # which the service does not build again
            command = f"iddpm serve --model {artifact} --backend tensorrt --build"
            lines.append(f"To build engines here, which takes minutes each: {command}")
        raise ModelError("\n".join(lines))
    if unmeasured := [str(size) for size, (record, _) in engines.items() if record.parity is None]:
        log.warning(
            "%s: no parity with PyTorch was measured for the engines for batches of %s",
            wanted.target.name,
            ", ".join(unmeasured),
        )
    return engines


def graph_shapes(model: ModelConfig, size: int) -> Shapes:
    """Return shape and type of the graph's tensors at a batch size."""
    image = (size, *model.image_shape)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "x_t": (image, torch.float32),
        "emb_t": ((size, model.emb_channels), torch.float32),
        OUTPUT: ((size, model.out_channels, *image[2:]), torch.float32),
    }
    if model.num_classes is not None:
        shapes["y"] = ((size,), torch.int64)
    if model.cond_shape is not None:
        shapes["cond"] = ((size, *model.cond_shape), torch.float32)
    return shapes


def refuse_unequal_rows(
    run: EmbNetwork, embed_timesteps: Any, config: CheckpointConfig, size: int, device: torch.device
) -> None:
    """Check that an engine gives identical rows of a batch identical outputs (NVIDIA/TensorRT, issue 4813).

    Tested at the first, a middle and the last timestep.

    Raises:
        ModelError: the outputs of the rows differ, or are not finite.
    """
    model = config.model
    row = torch.zeros(size, dtype=torch.int64, device=device)
    x_t = normal(row, row, row, STREAM_X_T, model.image_shape)
    cond = None if model.cond_shape is None else normal(row, row, row + 1, STREAM_X_T, model.cond_shape)
    t_model = respace(config.diffusion).t_model
    for t in t_model[np.linspace(0, len(t_model) - 1, 3).astype(np.int64)]:
        emb_t = embed_timesteps(torch.full((size,), float(t), device=device))
        out = run(NetworkInputs(x_t, emb_t, None if model.num_classes is None else row, cond))
        if not bool(out.isfinite().all()):
            raise ModelError(f"the engine for batches of {size} gives numbers that are not finite")
        if not bool((out == out[:1]).all()):
            raise ModelError(f"the engine for batches of {size} gives identical rows different outputs; build it again")


def network_id(
    description: str,
    manifest: Manifest,
    records: dict[int, EngineRecord],
    device: torch.device,
    kernels: dict[str, object],
) -> str:
    """Return a hash of what pixels depend on, plans included: two builds of a graph may compute in different order."""
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "description": description,
        "files": {name: entry.sha256 for name, entry in manifest.files.items()},
        "diffusion": manifest.checkpoint.diffusion.model_dump(mode="json"),
        "plans": {size: record.plan.sha256 for size, record in records.items()},
        "capability": torch.cuda.get_device_capability(device),
        "multiprocessors": properties.multi_processor_count,
        **kernels,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_precision(model: ArtifactModel, wanted: PrecisionChoice) -> None:
    precision = model.manifest.precision
    if wanted not in ("auto", precision):
        raise ModelError(
            f"precision '{wanted}': the graph in {model.graph.parent} computes in {precision}, and TensorRT keeps to "
            f"that; export it with --precision {wanted}"
        )


def _flavour() -> Flavour:
    try:
        return installed_flavour()
    except EngineError as error:
        raise ModelError(str(error)) from error


def _cuda_device(wanted: str) -> torch.device:
    device = choose_device(wanted)
    if device.type != "cuda":
        raise ModelError(f"device '{wanted}': TensorRT needs a CUDA device, and torch {torch.__version__} offers none")
    return device
