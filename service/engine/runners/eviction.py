"""Slots to host memory and back, for runners whose arrays are torch tensors by slot id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

SLOT_ARRAYS = ("x", "x0", "step", "plan_offset", "y", "cfg_scale", "seed", "image_index")
"""Everything of a `SlotTable` that is one image's; plans stay where they are, an evicted image keeps its lines."""


class _SlotTable(Protocol):
    x: Tensor


class EvictsSlots:
    """Gives a runner with a `SlotTable` in `_slots` the `evict` and `restore` of `Runner`."""

    _slots: _SlotTable

    @torch.inference_mode()
    def evict(self, slots: Sequence[int]) -> list[object]:
        """Copy slots to host memory, bit for bit."""
        return [{name: getattr(self._slots, name)[slot].to("cpu", copy=True) for name in SLOT_ARRAYS} for slot in slots]

    @torch.inference_mode()
    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        """Put saved states into slots, bit for bit."""
        for slot, state in zip(slots, saved, strict=True):
            if not isinstance(state, dict) or set(state) != set(SLOT_ARRAYS):
                raise TypeError("only what `evict` returned can be restored")
            for name, value in state.items():
                getattr(self._slots, name)[slot] = value
