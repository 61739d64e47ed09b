"""A loaded model as the service describes it, without its network."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from service.engine.model_ids import model_id
from service.errors import UnknownModel
from service.models.class_names import ClassNames


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that requests can name."""

    name: str
    loaded: int = 1
    """Number of times that a model was loaded under this name, including this one."""
    config: CheckpointConfig
    numerics_id: str
    backend: str
    loaded_at: float
    """Seconds since 1970."""
    threads: int = 0
    """Threads of the processor that a network call takes; 0: it does not run on the processor."""
    classifier: ClassifierCheckpointConfig | None = None
    """The noisy classifier that guides it."""
    classes: ClassNames | None = None
    """One name per class; None if neither the model nor its classifier has any."""

    @property
    def engine_id(self) -> str:
        """Its id in the engine."""
        return model_id(self.name, self.loaded)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names alone."""
        return None if self.classes is None else self.classes.names


def find_model(models: dict[str, ServedModel], name: str | None) -> ServedModel:
    """Return the model of that name, the first one for None.

    Raises:
        UnknownModel: no such model.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise UnknownModel(name, list(models))
    return models[name]
