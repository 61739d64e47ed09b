"""EngineConfig: batch width, queue length, slots and scheduling policy of one engine."""

from __future__ import annotations

from pydantic import Field

from diffusion.config import FrozenConfig
from service.engine.policies import PolicyName


class EngineConfig(FrozenConfig):
    """Configuration of one engine. Defines the defaults and rules of the fields `service.settings.Settings` reuses."""

    # At least 2: one image with classifier-free guidance needs two rows
    max_rows: int = Field(default=8, ge=2, le=1024)
    """Maximum rows of a network call."""
    slots_per_row: int = Field(default=4, ge=1)
    """Slots (images in flight that have started) per row of width."""
    max_queue: int = Field(default=256, ge=0)
    """Rows accepted beyond the width before requests are rejected with 503; an image with guidance takes two."""
    max_wait_s: float = Field(default=600.0, gt=0)
    """Maximum predicted wait of an interactive request before it is rejected with 503; batch work may wait longer."""
    client_share: float = Field(default=1.0, gt=0, le=1)
    """Part of all accepted rows that one client (a key or an address) may hold before it gets 429; 1: no limit."""
    max_given_bytes: int = Field(default=256 << 20, ge=0)
    """Maximum memory of images, masks and latents that requests bring along, while they are read and accepted;
    beyond it, requests with given images are rejected with 503."""
    policy: PolicyName = "srw"
    """Scheduling policy: srw (aged shortest remaining work), fifo, deadline (earliest first)."""
    ageing: float = Field(default=1.0, gt=0)
    """Row-steps of remaining work that one step of waiting offsets under srw; chosen in docs/decisions/0005."""
    client_allowance: int = Field(default=1000, ge=1)
    """Row-steps that a client may receive beyond an equal share before it yields to others: four long images."""
    batch_share: float = Field(default=0.125, ge=0, lt=1)
    """Part of the row-steps that waiting batch work gets, regardless of the amount of interactive work."""
    width_efficiency: float = Field(default=0.95, gt=0, le=1)
    """The width is the smallest one whose row rate is at least this part of the best row rate."""
    timed_calls: int = Field(default=2, ge=0)
    """Steps timed at start-up per batch size, each after a warm-up step; 0: learn the costs from the first steps."""
    strict_graphs: bool = False
    """On a CUDA device, refuse to start if memory does not suffice for a graph of every batch size."""

    @property
    def num_slots(self) -> int:
        """Return the maximum number of started images of one model."""
        return self.max_rows * self.slots_per_row

    @property
    def max_in_flight(self) -> int:
        """Return the maximum number of accepted, unfinished rows."""
        return self.max_rows + self.max_queue
