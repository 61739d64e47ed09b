"""SlotTable: the device arrays of a model's images in flight, one slot per image, allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, to_numpy
from diffusion.config import ModelConfig
from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED, STREAM_X_T, check_range, unchecked_normal
from diffusion.update import begun
from service.backends.device_queue import Normal
from service.engine.request import GivenArrays, ImageParams


@dataclass(frozen=True)
class SavedSlot:
    """The contents of a slot, in host memory."""

    x: npt.NDArray[np.float32]
    x0: npt.NDArray[np.float32]
    given: GivenArrays | None
    """The image's own arrays, if its slot has copies of them: of a mask or a conditioning image."""


class SlotTable(Generic[A]):
    """Arrays indexed by slot id. The scheduler tracks which ids are in use."""

    def __init__(
        self,
        model: ModelConfig,
        num_slots: int,
        xp: Any,
        device: Any,
        send: Callable[[npt.NDArray[Any]], A],
        normal: Normal[A] = unchecked_normal,
    ) -> None:
        """Allocate the arrays.

        Args:
            model: configuration of the model; gives the image shape.
            num_slots: number of slots for images; one spare slot is added.
            xp: array namespace.
            device: device of the arrays.
            send: copies a host array to the device.
            normal: generates x_T.
        """
        self.spare_slot = num_slots
        """Slot for padding places of a batch. Its contents are finite and have no meaning."""
        self.send: Callable[[npt.NDArray[Any]], A] = send
        self.image_shape = model.image_shape
        self._normal: Normal[A] = normal
        self._xp = xp
        self._device = device
        self.x: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """x_t."""
        self.x0: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """The previous step's predicted x0, for multistep solvers."""
        self.given: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """Given images. Those of slots whose image has no mask have no meaning."""
        self.keep: A = self._zeros((num_slots + 1, 1, *self.image_shape[1:]), xp.float32)
        """How much of each given pixel is kept; as for `given`."""
        self.cond: A | None = None
        """Conditioning images; None for a model that takes none."""
        self._cond_shape: tuple[int, int, int] | None = model.cond_shape
        if self._cond_shape is not None:
            self.cond = self._zeros((num_slots + 1, self._cond_shape[0], *self.image_shape[1:]), xp.float32)
        self._copied: dict[int, GivenArrays] = {}
        """The arrays in `given`, `keep` and `cond`, by slot."""

    def integers(self, values: Sequence[int]) -> A:
        """Copy integers to the device, as int64 [n]."""
        return self.send(np.array(values, dtype=np.int64))

    def start(self, slots: Sequence[int], params: Sequence[ImageParams], begins: Sequence[tuple[float, float]]) -> None:
        """Initialize slots of new images: x_T is a function of seed and image index, and of a given image.

        Args:
            slots: their slots.
            params: their parameters.
            begins: `SamplingPlan.begin` of each.

        Raises:
            ValueError: a chain begins with a given image, or the model takes a conditioning image, and there is none,
                or one of another shape.
        """
        seeds, image_indices = [p.seed for p in params], [p.image_index for p in params]
        check_range("seed", min(seeds), max(seeds), MAX_SEED)
        check_range("image_index", min(image_indices), max(image_indices), MAX_IMAGE_INDEX)
        index = self.integers(slots)
        step = self._zeros((len(slots),), self._xp.int64)
        x = self._normal(self.integers(seeds), self.integers(image_indices), step, STREAM_X_T, self.image_shape)
        for k, (p, begin) in enumerate(zip(params, begins, strict=True)):
            if begin[0] != 0:
                x[k] = begun(begin, self.send(self._image(p.given)), x[k])
        self._put_given(slots, [p.given for p in params])
        self.x[index] = x
        self.x0[index] = self._zeros((len(slots), *self.image_shape), self._xp.float32)

    def save(self, slots: Sequence[int]) -> list[SavedSlot]:
        """Copy the contents of slots to host memory, bit for bit."""
        index = self.integers(slots)
        x, x0 = to_numpy(self.x[index]), to_numpy(self.x0[index])
        # Copies: a view would keep the memory of all images that were saved together
        return [SavedSlot(x[k].copy(), x0[k].copy(), self._copied.get(slot)) for k, slot in enumerate(slots)]

    def load(self, slots: Sequence[int], saved: Sequence[SavedSlot]) -> None:
        """Restore what `save` returned, bit for bit; the slots may differ from the original ones."""
        index = self.integers(slots)
        self.x[index] = self.send(np.stack([state.x for state in saved]))
        self.x0[index] = self.send(np.stack([state.x0 for state in saved]))
        self._put_given(slots, [state.given for state in saved])

    def _put_given(self, slots: Sequence[int], arrays: Sequence[GivenArrays | None]) -> None:
        """Copy masks with their images, and conditioning images, into their slots; forget those of other images."""
        for slot, given in zip(slots, arrays, strict=True):
            self._copied.pop(slot, None)
            if self.cond is not None:
                self.cond[slot] = self.send(self._cond(given))
            if given is not None and given.keep is not None:
                self.given[slot] = self.send(self._image(given))
                self.keep[slot] = self.send(given.keep)
            if given is not None and (self.cond is not None or given.keep is not None):
                self._copied[slot] = given

    def _image(self, given: GivenArrays | None) -> npt.NDArray[np.float32]:
        image = None if given is None else given.image
        if image is None or image.shape != self.image_shape:
            raise ValueError(f"the given image must be {self.image_shape}; got {_shape(image)}")
        return image

    def _cond(self, given: GivenArrays | None) -> npt.NDArray[np.float32]:
        cond = None if given is None else given.cond
        if cond is None or cond.shape != self._cond_shape:
            raise ValueError(f"the conditioning image must be {self._cond_shape}; got {_shape(cond)}")
        return cond

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> A:
        array: A = self._xp.zeros(shape, dtype=dtype, device=self._device)
        return array


def _shape(array: npt.NDArray[Any] | None) -> object:
    return "none" if array is None else array.shape
