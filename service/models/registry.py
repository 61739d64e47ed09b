"""Load, reload and unload models by name while the engine runs.

For the engine, a reloaded model is a new model: images accepted for the old weights are finished with the old weights,
under the old numerics_id, and the old weights are freed after the last of these images. The slow parts (reading,
compiling, self-test, warm-up, timing) run in a separate thread; the engine adds the new model between two steps.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.quoting import quoted
from service.backends.ensemble import LoadedModel
from service.engine.async_engine import AsyncEngine
from service.engine.config import EngineConfig
from service.engine.runners.array_runner import ArrayRunner
from service.engine.step_costs import StepCosts
from service.engine.timing import time_steps
from service.errors import LoadConflict, LoadFailed, ModelError, UnknownModel
from service.models.cascades import linked
from service.models.class_names import ClassNames
from service.models.served_model import ServedModel
from service.settings import MODEL_NAME, Cascade

log = logging.getLogger(__name__)

T = TypeVar("T")
LoadModel = Callable[[Path], LoadedModel]


@dataclass(frozen=True)
class _Prepared:
    runner: ArrayRunner[Any]
    costs: StepCosts
    served: ServedModel


class ModelRegistry:
    """Loads and unloads models, one change at a time. Use it only from the event loop."""

    def __init__(
        self,
        models: dict[str, ServedModel],
        engine: AsyncEngine,
        config: EngineConfig,
        load: LoadModel,
        root: Path,
        max_loaded: int,
        cascades: Sequence[Cascade] = (),
    ) -> None:
        """Create a registry of the models that are already served.

        Args:
            models: models by name, the default one first; only the registry modifies this dict.
            engine: runs the models.
            config: configuration of the engine.
            load: loads a model from a folder; slow, hence called in a thread.
            root: the folder whose subfolders may be loaded, by name.
            max_loaded: maximum number of models in memory, including the one being loaded and replaced or unloaded ones
                that still have images to finish.
            cascades: the cascades among the models; a reload of one of their models changes them too.
        """
        self._models = models
        self._cascades = cascades
        self._engine = engine
        self._config = config
        self._load = load
        self._root = root
        self._max_loaded = max_loaded
        self._times_loaded = Counter({name: model.loaded for name, model in models.items() if model.stages is None})
        self._changing: asyncio.Task[ServedModel] | None = None

    async def load(self, name: str) -> ServedModel:
        """Load or reload a model. A model that it replaces is served until the load succeeds.

        Loading continues if the client disconnects.

        Raises:
            UnknownModel: the root has no folder with that name.
            LoadConflict: another model is being loaded, `max_loaded` models are in memory, or a cascade has that name.
            LoadFailed: the model cannot be served; the reason is logged.
            Draining: the engine does not accept work.
            EngineDead: the engine stopped during the load.
        """
        folder = self._root / name
        if not MODEL_NAME.fullmatch(name) or not folder.is_dir():
            raise UnknownModel(name, self._available())
        self._engine.check_ready()  # before the work
        if any(cascade.name == name for cascade in self._cascades):
            raise LoadConflict(f"{name} is the name of a cascade; reload its models")
        self._refuse_second_change()
        if self._engine.models_held >= self._max_loaded:
            raise LoadConflict(
                f"{self._engine.models_held} models are in memory, at most {self._max_loaded} may be: unload one, or "
                "wait for the last images of one that was replaced"
            )
        self._changing = asyncio.create_task(self._load_and_swap(name, folder))
        return await asyncio.shield(self._changing)

    def unload(self, name: str) -> None:
        """Stop serving a model; accepted images are finished. If it was the default, the next one becomes the default.

        Raises:
            UnknownModel: no model with that name is served.
            LoadConflict: it is the only model, a cascade or a part of one, or a model is being loaded.
        """
        if name not in self._models:
            raise UnknownModel(name, list(self._models))
        self._refuse_second_change()
        for cascade in self._cascades:
            if name in (cascade.name, *cascade.models):
                raise LoadConflict(f"{name} belongs to the cascade {cascade.name}, which is served until shutdown")
        if len(self._models) == 1:
            raise LoadConflict(f"{name} is the only model; a service without any cannot answer")
        self._engine.retire(self._models.pop(name).engine_id)
        log.info("model %s: unloaded", name)

    async def _load_and_swap(self, name: str, folder: Path) -> ServedModel:
        try:
            prepared = await self._prepared(name, folder)
            served = prepared.served
            relinked = self._relinked(served)
            await self._engine.load(served.engine_id, prepared.runner, prepared.costs)
            self._times_loaded[name] += 1
            replaced = self._models.get(name)
            self._models[name] = served  # keeps its position, so a reloaded default stays the default
            self._models.update(relinked)
            if replaced is not None:
                self._engine.retire(replaced.engine_id)
            log.info("model %s: loaded, %s, numerics_id %s", name, served.backend, served.numerics_id)
            return served
        finally:
            self._changing = None

    def _relinked(self, served: ServedModel) -> dict[str, ServedModel]:
        """Return the cascades that a loaded model belongs to, with that model.

        Raises:
            LoadFailed: it does not fit into one of them.
        """
        models = {**self._models, served.name: served}
        try:
            return {c.name: linked(c, models) for c in self._cascades if served.name in c.models}
        except ModelError as error:
            raise LoadFailed(str(error)) from error

    async def _prepared(self, name: str, folder: Path) -> _Prepared:
        try:
            return await _in_daemon(partial(self._prepare, name, folder, self._times_loaded[name] + 1))
        except Exception as error:  # a damaged file may raise any error in a parser
            log.exception("model %s: could not be loaded", name)
            kind = type(error).__name__
        # Outside of `except`: a chained error would keep the partly loaded model in memory
        raise LoadFailed(f"model {quoted(name)} could not be loaded ({kind}); see the log for the reason")

    def _prepare(self, name: str, folder: Path, loaded: int) -> _Prepared:
        gc.collect()  # free the reference cycles of earlier loads
        model = self._load(folder)
        if model.threads == 0:  # as for those served at start, see `_refuse_unfit_admin_root`
            raise ModelError(f"{folder} would run on a CUDA device, where models cannot be loaded while others run")
        runner = ArrayRunner(model, self._config)
        runner.warm_up()
        costs = time_steps(runner, self._config, time.monotonic)
        return _Prepared(runner, costs, served_model(name, model, runner.numerics_id, loaded))

    def _refuse_second_change(self) -> None:
        if self._changing is not None:
            raise LoadConflict("a model is being loaded; try again when it is loaded")

    def _available(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir() if path.is_dir() and MODEL_NAME.fullmatch(path.name))


async def _in_daemon(function: Callable[[], T]) -> T:
    """Call a function in a daemon thread; a thread of the event loop's executor would block the exit of the process."""
    called: Future[T] = Future()

    def call() -> None:
        if not called.set_running_or_notify_cancel():
            return
        try:
            called.set_result(function())
        except BaseException as error:
            called.set_exception(error)

    threading.Thread(target=call, name="load", daemon=True).start()
    return await asyncio.wrap_future(called)


def served_model(name: str, model: LoadedModel, numerics_id: str, loaded: int = 1) -> ServedModel:
    """Return the description of a loaded model."""
    classifier = None if model.classifier is None else model.classifier.config
    return ServedModel(
        name=name,
        loaded=loaded,
        config=model.config,
        numerics_id=numerics_id,
        backend=model.description,
        precision=model.precision,
        loaded_at=time.time(),
        threads=model.threads,
        classifier=classifier,
        classes=_classes(model.config, classifier),
    )


def _classes(config: CheckpointConfig, classifier: ClassifierCheckpointConfig | None) -> ClassNames | None:
    """Return the class names of a model or its classifier (equal if both have names); None if there are no classes."""
    count = config.model.num_classes
    if count is None and classifier is not None:
        count = classifier.model.num_classes
    if count is None:
        return None
    of_classifier = None if classifier is None else classifier.class_names
    return ClassNames(config.class_names or of_classifier or tuple(str(index) for index in range(count)))
