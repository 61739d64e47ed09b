"""Backends by name; each is imported when it is chosen, so that nobody needs the packages of the others."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.backends.base import BackendOptions, Denoiser
from service.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Where a backend's factory is, which is called with a model folder and `BackendOptions`, and what it needs."""

    module: str
    factory: str
    requires: str
    """The package that it cannot do without, by the name it is imported under."""
    extra: str
    """The extra of ours that installs it."""


BACKENDS: dict[str, Backend] = {
    "torch": Backend(module="service.backends.torch_backend", factory="TorchBackend", requires="torch", extra="torch"),
}
AUTO = "torch"
"""What `auto` means, while there is one backend."""


def load_denoiser(folder: Path, backend: str, options: BackendOptions) -> Denoiser[Any]:
    """Load a model folder with a backend.

    Args:
        folder: a checkpoint, or whatever else the backend serves.
        backend: a name in `BACKENDS`, or `auto`.
        options: how to run it.

    Raises:
        ModelError: a folder that cannot be served, options that the backend cannot meet, an unknown backend, or one
            whose package is not installed; the message says what to install.
    """
    name = AUTO if backend == "auto" else backend
    if name not in BACKENDS:
        raise ModelError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    chosen = BACKENDS[name]
    try:
        importlib.import_module(chosen.requires)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"backend '{name}' needs {error.name}, which is not installed: pip install 'iddpm[{chosen.extra}]'"
        ) from error
    denoiser: Denoiser[Any] = getattr(importlib.import_module(chosen.module), chosen.factory)(folder, options)
    return denoiser
