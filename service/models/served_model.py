"""What the service knows of a loaded model, apart from its network."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from service.engine.model_ids import model_id
from service.errors import UnknownModel
from service.models.class_names import ClassNames


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What routes know of a model."""

    name: str
    loaded: int = 1
    """How often something was loaded under this name, this included."""
    config: CheckpointConfig
    numerics_id: str
    backend: str
    loaded_at: float
    """Seconds since 1970."""
    classifier: ClassifierCheckpointConfig | None = None
    """The noisy classifier that guides it."""
    classes: ClassNames | None = None
    """One name per class; None if neither the model nor its classifier has any."""

    @property
    def engine_id(self) -> str:
        """What the engine knows it by."""
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
