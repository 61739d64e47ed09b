"""Select a backend by name. A backend is imported only when chosen, so packages of the others are not required."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.artifact import find_artifact
from formats.ensemble import EnsembleError, is_ensemble, read_ensemble
from formats.extras import install_command
from service.backends.base import BackendOptions, Denoiser
from service.backends.ensemble import DenoiserEnsemble, LoadedModel, networks_of
from service.backends.self_test import invariant_batch_sizes
from service.errors import ModelError

log = logging.getLogger(__name__)

NVIDIA_DEVICE = Path("/dev/nvidiactl")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Location of a backend's factory, which takes a model folder and `BackendOptions`, and its requirements."""

    module: str
    factory: str
    requires: str
    """Import name of the package that it requires."""
    extra: str | None = None
    """The extra of iddpm that installs the package; None: the base installation includes it."""


BACKENDS: dict[str, Backend] = {
    "openvino": Backend(module="service.backends.openvino_backend", factory="OpenVinoBackend", requires="openvino"),
    "onnxruntime": Backend(
        module="service.backends.onnxruntime_backend", factory="OnnxRuntimeBackend", requires="onnxruntime"
    ),
    "torch": Backend(module="service.backends.torch_backend", factory="TorchBackend", requires="torch", extra="torch"),
    "tensorrt": Backend(
        module="service.backends.tensorrt_backend", factory="TensorRTBackend", requires="torch", extra="tensorrt"
    ),
}


def load_model(folder: Path, backend: str, options: BackendOptions) -> LoadedModel:
    """Load a model folder with a backend.

    Args:
        folder: a checkpoint, an artifact, a checkpoint with its artifact inside, or an ensemble of such folders.
        backend: a name in `BACKENDS`, or `auto`.
        options: how to run it.

    Raises:
        ModelError: the folder does not exist or cannot be served, the backend does not support the options, or the
            backend is unknown or not installed; the message then gives the command that installs it.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ModelError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    with _files_named_in_errors(folder):
        if folder.is_file():
            raise ModelError(f"{folder}: a model is a folder, and this is a file; iddpm import makes one of weights")
        if not folder.is_dir():
            raise ModelError(f"{folder}: there is no such folder")
        return _fastest(folder, options) if backend == "auto" else _load(folder, backend, options)


def load_denoiser(folder: Path, backend: str, options: BackendOptions) -> Denoiser[Any]:
    """Load a model folder of one network, as `load_model`.

    Raises:
        ModelError: as `load_model`; also if the folder is an ensemble.
    """
    model = load_model(folder, backend, options)
    if isinstance(model, DenoiserEnsemble):
        raise ModelError(f"{folder} is an ensemble of {len(model.members)} networks, and one is needed")
    return model


def preference(folder: Path, device: str, has_gpu: bool) -> list[tuple[str, str]]:
    """Return pairs of backend and device that can serve a folder, fastest first.

    The order on a CPU follows the measurements in benchmarks/RESULTS.md.

    Args:
        folder: a model folder.
        device: the configured device: auto, cpu, cuda or cuda:N.
        has_gpu: whether the machine has an NVIDIA device.
    """
    if device.startswith("cuda"):
        return [("torch", device)]
    exported = all(find_artifact(network) is not None for network in _network_folders(folder))
    compiled = [(name, device) for name in ("openvino", "onnxruntime") if exported]
    if has_gpu and device == "auto":
        return [("torch", "cuda"), *compiled, ("torch", "cpu")]
    return [*compiled, ("torch", device)]


def _fastest(folder: Path, options: BackendOptions) -> LoadedModel:
    """Load the folder with the first backend of `preference` that is installed, accepts it and passes the self-test."""
    passed_over: list[str] = []
    for name, device in preference(folder, options.device, NVIDIA_DEVICE.exists()):
        try:
            model = _load(folder, name, replace(options, device=device))
            for denoiser in networks_of(model):
                for network in (denoiser, denoiser.classifier):
                    if network is not None:
                        invariant_batch_sizes(network, options.max_rows)
        except (ModelError, RuntimeError) as error:
            passed_over.append(f"{name}: {error}")
            continue
        reasons = f"; passed over {'; '.join(passed_over)}" if passed_over else ", the fastest for this machine"
        log.log(logging.WARNING if passed_over else logging.INFO, "backend auto: %s%s", model.description, reasons)
        return model
    if len(passed_over) == 1:
        raise ModelError(passed_over[0].partition(": ")[2])
    raise ModelError(f"no backend can serve {folder}. " + "; ".join(passed_over))


def _load(folder: Path, name: str, options: BackendOptions) -> LoadedModel:
    if not is_ensemble(folder):
        return _load_network(folder, name, options)
    try:
        ensemble = read_ensemble(folder)
    except EnsembleError as error:
        raise ModelError(str(error)) from error
    return DenoiserEnsemble(
        config=ensemble.config,
        names=ensemble.members,
        members=tuple(_load_network(member, name, options) for member in ensemble.folders),
        network_of=ensemble.network_of,
    )


def _network_folders(folder: Path) -> tuple[Path, ...]:
    """Return the folders of a model's networks; an ensemble that cannot be read is reported when it is loaded."""
    try:
        return read_ensemble(folder).folders if is_ensemble(folder) else (folder,)
    except EnsembleError:
        return (folder,)


def _load_network(folder: Path, name: str, options: BackendOptions) -> Denoiser[Any]:
    chosen = BACKENDS[name]
    try:
        importlib.import_module(chosen.requires)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"backend '{name}' needs {error.name}, which is not installed: {install_command(chosen.extra)}"
        ) from error
    except ImportError as error:  # a missing or outdated system library
        raise ModelError(f"backend '{name}': {chosen.requires} is installed but cannot be imported: {error}") from error
    with _files_named_in_errors(folder):
        denoiser: Denoiser[Any] = getattr(importlib.import_module(chosen.module), chosen.factory)(folder, options)
    return denoiser


@contextmanager
def _files_named_in_errors(folder: Path) -> Iterator[None]:
    """Convert errors of unreadable or endlessly nested files into `ModelError`."""
    try:
        yield
    except (OSError, RecursionError) as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
