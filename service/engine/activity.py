"""Work of each model since the process started, as plain counts. Code reads these; Prometheus reads the metrics."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class StepTotal:
    """Engine steps of one padded batch size."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class ModelActivity:
    """Work of one model or cascade. The event loop writes the image fields, the engine thread writes the others.

    A step of a cascade's model counts for the cascade too, if it advances one of the cascade's images.
    """

    images_done: int = 0
    images_failed: int = 0
    queue_s: float = 0.0
    """Total seconds from admission to the first network call, over completed images."""
    compute_s: float = 0.0
    """Total seconds from the first network call to the last, over completed images."""
    last_image_at: float = 0.0
    """Unix time at which an image last completed, in seconds; 0 if none has."""
    network_calls: int = 0
    steps: defaultdict[int, StepTotal] = field(default_factory=lambda: defaultdict(StepTotal))
    """Keyed by padded batch size."""


class Activity:
    """The counts of all models of an engine."""

    def __init__(self) -> None:
        self.row_steps = 0
        """Rows advanced by one sampling step, summed over all models; excludes images that failed in the step."""
        self._models = defaultdict[str, ModelActivity](ModelActivity)

    def of(self, model: str) -> ModelActivity:
        """Return the counts of a model or cascade by name. Reloading a model keeps its counts."""
        return self._models[model]
