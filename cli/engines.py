"""Build TensorRT engines with progress on the terminal, and compare them with PyTorch on their GPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from formats.artifact import NetworkParity
    from formats.tensorrt_files import Target
    from model_export.runtimes import Graph
    from service.backends.base import Denoiser


def build_engines(artifact: Path, store: Path, target: Target, batch_sizes: tuple[int, ...]) -> None:
    """Build the missing or unusable engines of the given batch sizes; a `BuildEngines` for the service.

    Raises:
        ArtifactError: the artifact cannot be read.
        EngineError: a build failed, or an engine is too far from PyTorch, which building alone does not mend.
        OSError: the store cannot be written.
    """
    from model_export.tensorrt_build import build_missing

    def notify(line: str) -> None:
        typer.echo(line, err=True)

    build_missing(artifact, target, batch_sizes, store=store, notify=notify, progress=show_phase)


def show_phase(phase: str, done: int, of: int) -> None:
    """Print the name of each build phase when it begins."""
    if done == 0:
        typer.echo(f"  {phase} ({of} steps)", err=True)


def measure_engines(checkpoint: Path, artifact: Path, device: str = "auto") -> dict[int, NetworkParity]:
    """Compare an artifact's engines with PyTorch on a GPU, and write the result to their records.

    From then on the service rejects engines outside the limit of their precision.

    Args:
        checkpoint: the checkpoint that the artifact was exported from.
        artifact: the artifact folder, with engines for all its batch sizes.
        device: the CUDA device to run them on.

    Returns:
        Relative errors by band of timesteps, for each batch size.

    Raises:
        ArtifactError: the artifact is of another checkpoint.
        ModelError: the engines cannot be run.
    """
    from formats.artifact import MODEL_FILE, read_artifact, refuse_foreign
    from formats.checkpoint import load_unet
    from formats.tensorrt_files import record_parity
    from model_export.parity import network_parity, unet_reference
    from model_export.runtimes import Runtime
    from service.backends.base import BackendOptions
    from service.backends.tensorrt_backend import TensorRTBackend

    manifest = read_artifact(artifact)
    refuse_foreign(artifact, manifest, checkpoint)
    config, network = load_unet(checkpoint)
    backend = TensorRTBackend(artifact, BackendOptions(max_rows=manifest.buckets[-1], device=device))
    reference = unet_reference(network, config, backend.time_mlp)
    target = backend.wanted.target
    found = {}
    for size in manifest.buckets:
        graph = as_graph(backend, size)
        runtime = Runtime(f"{target.flavour} {target.version}", manifest.precision, functools.partial(_opened, graph))
        found[size] = network_parity(graph, reference.calls, config, runtime, MODEL_FILE)
        record_parity(backend.store, backend.wanted, size, found[size])
    return found


def _opened(graph: Graph, _: Path) -> Graph:
    return graph


def as_graph(denoiser: Denoiser[Any], size: int) -> Graph:
    """Return a function that runs a torch denoiser on numpy arrays with any number of rows, in batches of `size`."""
    import numpy as np
    import torch

    from diffusion.network_inputs import NetworkInputs

    def run(inputs: Any) -> Any:
        rows = len(inputs["x_t"])
        outputs = []
        for first in range(0, rows, size):
            taken = np.minimum(np.arange(first, first + size), rows - 1)
            batch = {name: torch.from_numpy(values[taken]).to(denoiser.device) for name, values in inputs.items()}
            out = denoiser(NetworkInputs(batch["x_t"], batch["emb_t"], batch.get("y"), batch.get("cond")))
            outputs.append(out.cpu().numpy()[: rows - first])
        return np.concatenate(outputs)

    return run
