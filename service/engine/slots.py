"""SlotTable: the device arrays of a model's images in flight, one slot per image, allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, to_numpy
from diffusion.config import ModelConfig
from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED, STREAM_X_T, check_range, normal
from service.engine.request import ImageParams


@dataclass(frozen=True)
class SavedSlot:
    """The contents of a slot, in host memory."""

    x: npt.NDArray[np.float32]
    x0: npt.NDArray[np.float32]


class SlotTable(Generic[A]):
    """Arrays indexed by slot id. The scheduler tracks which ids are in use."""

    def __init__(
        self, model: ModelConfig, num_slots: int, xp: Any, device: Any, send: Callable[[npt.NDArray[Any]], A]
    ) -> None:
        """Allocate the arrays.

        Args:
            model: configuration of the model; gives the image shape.
            num_slots: number of slots for images; one spare slot is added.
            xp: array namespace.
            device: device of the arrays.
            send: copies a host array to the device.
        """
        self.spare_slot = num_slots
        """Slot for padding places of a batch. Its contents are finite and have no meaning."""
        self.send: Callable[[npt.NDArray[Any]], A] = send
        self.image_shape = (model.image_channels, model.image_size, model.image_size)
        self._xp = xp
        self._device = device
        self.x: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """x_t."""
        self.x0: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """The previous step's predicted x0, for multistep solvers."""

    def integers(self, values: Sequence[int]) -> A:
        """Copy integers to the device, as int64 [n]."""
        return self.send(np.array(values, dtype=np.int64))

    def start(self, slots: Sequence[int], params: Sequence[ImageParams]) -> None:
        """Initialize slots of new images: x_T is a function of seed and image index."""
        seeds, image_indices = [p.seed for p in params], [p.image_index for p in params]
        check_range("seed", min(seeds), max(seeds), MAX_SEED)
        check_range("image_index", min(image_indices), max(image_indices), MAX_IMAGE_INDEX)
        index = self.integers(slots)
        step = self._zeros((len(slots),), self._xp.int64)
        self.x[index] = normal(self.integers(seeds), self.integers(image_indices), step, STREAM_X_T, self.image_shape)
        self.x0[index] = self._zeros((len(slots), *self.image_shape), self._xp.float32)

    def save(self, slots: Sequence[int]) -> list[SavedSlot]:
        """Copy the contents of slots to host memory, bit for bit."""
        index = self.integers(slots)
        x, x0 = to_numpy(self.x[index]), to_numpy(self.x0[index])
        # Copies: a view would keep the memory of all images that were saved together
        return [SavedSlot(x[k].copy(), x0[k].copy()) for k in range(len(slots))]

    def load(self, slots: Sequence[int], saved: Sequence[SavedSlot]) -> None:
        """Restore what `save` returned, bit for bit; the slots may differ from the original ones."""
        index = self.integers(slots)
        self.x[index] = self.send(np.stack([state.x for state in saved]))
        self.x0[index] = self.send(np.stack([state.x0 for state in saved]))

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> A:
        array: A = self._xp.zeros(shape, dtype=dtype, device=self._device)
        return array
