"""What models have done since the process began, as plain counts. Metrics are for Prometheus; code reads these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StepTotal:
    """Engine steps of one padded batch size."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class ModelActivity:
    """What one model has done. The event loop writes the fields of images, the engine's thread the others."""

    images_done: int = 0
    images_failed: int = 0
    queue_s: float = 0.0
    """From admission to the first network call, over all images that are done."""
    compute_s: float = 0.0
    """From the first network call to the last, over all images that are done."""
    last_image_at: float = 0.0
    """When an image was last done, in seconds since 1970; 0: never."""
    network_calls: int = 0
    steps: dict[int, StepTotal] = field(default_factory=dict)
    """By padded rows."""


class Activity:
    """The counts of all models of an engine."""

    def __init__(self) -> None:
        self.row_steps = 0
        """Rows advanced by one sampling step, over all models; images that failed in a step are not counted for it."""
        self._models: dict[str, ModelActivity] = {}

    def of(self, model: str) -> ModelActivity:
        """Return the counts of a model by its name. A model that is loaded again keeps them."""
        return self._models.setdefault(model, ModelActivity())
