"""ModelLoader: which folder becomes which network, under which name, the way the settings say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from diffusion.tensorrt_files import BuildEngines
from service.backends.base import Denoiser
from service.backends.select import load_denoiser
from service.errors import ModelError
from service.settings import Settings

T = TypeVar("T")


class ModelLoader:
    """Loads model folders; called with one of them, or told to load all those that the settings name."""

    def __init__(self, settings: Settings, build_engines: BuildEngines | None = None) -> None:
        """Look at what is asked for, before any of it is loaded.

        Args:
            settings: what the operator said.
            build_engines: what builds engines of TensorRT, where the settings ask for that: the service cannot.

        Raises:
            ModelError: the settings ask for what cannot be.
        """
        if settings.build_engines and build_engines is None:
            raise ModelError(
                "build_engines: this service was started without what builds engines; use iddpm serve --build"
            )
        builder = build_engines if settings.build_engines else None
        self._options = replace(settings.backend_options(), build_engines=builder)
        self._backend = settings.backend
        self._folders = _by_name(settings.models)
        self._begun: Future[dict[str, Denoiser[Any]]] | None = None

    def __call__(self, folder: Path) -> Denoiser[Any]:
        """Load a folder.

        Raises:
            ModelError: it cannot be served, or not in the way that the settings ask for.
        """
        return load_denoiser(folder, self._backend, self._options)

    def begin(self) -> None:
        """Begin in a thread what `load_all` then waits for: reading and compiling leave the interpreter to others."""
        self._begun = in_daemon(self._load_all)

    def load_all(self) -> dict[str, Denoiser[Any]]:
        """Load what the settings name: networks by name, the default one first.

        Raises:
            ModelError: as when called.
        """
        begun, self._begun = self._begun, None  # a future keeps its result: what is served may be unloaded one day
        return self._load_all() if begun is None else begun.result()

    def _load_all(self) -> dict[str, Denoiser[Any]]:
        return {name: self(folder) for name, folder in self._folders.items()}


def in_daemon(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread that keeps no process from ending, as those of executors would."""
    called: Future[T] = Future()

    def call() -> None:
        try:
            called.set_result(function())
        except BaseException as error:
            called.set_exception(error)

    threading.Thread(target=call, name="load", daemon=True).start()
    return called


def model_name(folder: Path) -> str:
    """Return the name a model folder is served under: the folder's own."""
    return folder.resolve().name


def _by_name(folders: tuple[Path, ...]) -> dict[str, Path]:
    names = [model_name(folder) for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ModelError(f"models are served by folder name, which must differ; twice here: {', '.join(sorted(twice))}")
    return dict(zip(names, folders, strict=True))
