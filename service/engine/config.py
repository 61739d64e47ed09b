"""EngineConfig: how wide, how long a queue, how many slots."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from diffusion.config import FrozenConfig


class EngineConfig(FrozenConfig):
    """Sizes of one engine."""

    max_rows: int = Field(default=8, ge=2)
    """Width: most rows of a network call. At least 2, which one image with classifier-free guidance takes."""
    slots_per_row: int = Field(default=4, ge=1)
    """Slots (images in flight that have started) per row of width."""
    max_queue: int = Field(default=256, ge=0)
    """Images accepted beyond the width before requests are refused."""
    plan_lines: int = Field(default=16384, ge=16)
    """Capacity of a model's table of sampling plans, in lines (one per step of each distinct plan in flight)."""

    def with_room_for(self, num_timesteps: int) -> Self:
        """Return a configuration whose plan table holds the longest plan of a model with that many timesteps."""
        return self.replace(plan_lines=max(self.plan_lines, num_timesteps))

    @property
    def num_slots(self) -> int:
        """Images of one model that can have started."""
        return self.max_rows * self.slots_per_row

    @property
    def max_in_flight(self) -> int:
        """Images accepted and not finished, at most."""
        return self.max_rows + self.max_queue
