"""Description of a loaded model, without its network."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from service.engine.model_ids import model_id
from service.errors import UnknownModel
from service.models.class_names import ClassNames


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A served model: name, configuration, class names and identity of its numerics."""

    name: str
    loaded: int = 1
    """Number of loads under this name so far, including this one."""
    config: CheckpointConfig
    numerics_id: str
    backend: str
    precision: str
    """Precision in which its network computes; of an ensemble, those of its members."""
    loaded_at: float
    """Seconds since 1970."""
    threads: int = 0
    """Number of CPU threads that a network call uses; 0: it does not run on the CPU."""
    classifier: ClassifierCheckpointConfig | None = None
    """Configuration of the noisy classifier that guides the model; None without one."""
    classes: ClassNames | None = None
    """One name per class; None if neither the model nor its classifier has classes."""
    stages: tuple[ServedModel, ServedModel] | None = None
    """Base and upsampler of a cascade (`service.models.cascades`), whose other fields are those of its base."""

    @property
    def engine_id(self) -> str:
        """Id of the model in the engine; of a cascade, that of its base."""
        return model_id(self.name, self.loaded) if self.stages is None else self.stages[0].engine_id

    @property
    def result_config(self) -> CheckpointConfig:
        """Configuration of the model that makes the results: of a cascade, its upsampler."""
        return self.config if self.stages is None else self.stages[1].config

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names in order; None without classes."""
        return None if self.classes is None else self.classes.names


def find_model(models: dict[str, ServedModel], name: str | None) -> ServedModel:
    """Return the model with that name; for None, the first one.

    Raises:
        UnknownModel: there is no such model.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise UnknownModel(name, list(models))
    return models[name]
