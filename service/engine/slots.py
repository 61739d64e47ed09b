"""SlotTable: the arrays of a model's images in flight, one slot each, and of their plans. Allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, to_numpy
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig
from diffusion.noise import MAX_SEED, MAX_WORD, STREAM_X_T, check_range, normal
from diffusion.plans import PLAN_COLUMNS, SamplingPlan
from service.engine.request import ImageParams

BY_SLOT = ("x", "x0", "step", "plan_offset", "y", "cfg_scale", "classifier_scale", "seed", "image_index")
"""The arrays that hold something of an image. Plans stay where they are: an evicted image keeps its lines."""


@dataclass(frozen=True)
class SavedSlot:
    """What a slot held, in host memory."""

    arrays: dict[str, npt.NDArray[Any]]


class SlotTable(Generic[A]):
    """Arrays by slot id and by plan line; which ids are in use is the scheduler's business."""

    def __init__(
        self,
        config: CheckpointConfig,
        num_slots: int,
        plan_lines: int,
        xp: Any,
        device: Any,
        classifier: ClassifierCheckpointConfig | None,
        send: Callable[[npt.NDArray[Any]], A],
    ) -> None:
        """Allocate.

        Args:
            config: of the model.
            num_slots: for images; there is one more, which is nobody's.
            plan_lines: for plans.
            xp: makes the arrays.
            device: where they are.
            classifier: that guides the model.
            send: copies numbers to where the arrays are.
        """
        model = config.model
        self.spare_slot = num_slots
        """For places of a batch that no image has; what it holds is finite, and means nothing."""
        self.send: Callable[[npt.NDArray[Any]], A] = send
        self.image_shape = (model.image_channels, model.image_size, model.image_size)
        self._xp = xp
        self._device = device
        self.x: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """x_t."""
        self.x0: A = self._zeros((num_slots + 1, *self.image_shape), xp.float32)
        """The previous step's predicted x0, for multistep solvers."""
        self.step: A = self._zeros((num_slots + 1,), xp.int64)
        """Sampling steps done."""
        self.plan_offset: A = self._zeros((num_slots + 1,), xp.int64)
        self.y: A = self._zeros((num_slots + 1,), xp.int64)
        """Label; 0 where the image has none."""
        self.cfg_scale: A = self._zeros((num_slots + 1,), xp.float32)
        self.classifier_scale: A = self._zeros((num_slots + 1,), xp.float32)
        self.seed: A = self._zeros((num_slots + 1,), xp.int64)
        self.image_index: A = self._zeros((num_slots + 1,), xp.int64)
        self.plan: A = self._zeros((plan_lines, len(PLAN_COLUMNS)), xp.float32)
        """Lines of the sampling plans."""
        self.emb_t: A = self._zeros((plan_lines, model.emb_channels), xp.float32)
        """The embedded timestep of each plan line."""
        width = 0 if classifier is None else classifier.model.emb_channels
        self.classifier_emb_t: A = self._zeros((plan_lines, width), xp.float32)
        """The same, as the classifier embeds it."""
        self.is_guided = np.zeros(num_slots, dtype=np.bool_)
        """Whether cfg_scale is not 1: kept on the host, which lays out the batch without waiting for the device."""
        self.is_classified = np.zeros(num_slots, dtype=np.bool_)
        """Whether classifier_scale is not 0; on the host likewise."""

    def integers(self, values: Sequence[int]) -> A:
        """Bring integers to where the arrays are: int64 [n]."""
        return self.send(np.array(values, dtype=np.int64))

    def write_plan(self, offset: int, plan: SamplingPlan, emb_t: A, classifier_emb_t: A | None = None) -> None:
        """Put a plan's lines, and their embedded timesteps, into the table."""
        lines = slice(offset, offset + plan.num_steps)
        self.plan[lines] = self.send(plan.table)
        self.emb_t[lines] = emb_t
        if classifier_emb_t is not None:
            self.classifier_emb_t[lines] = classifier_emb_t

    def start(self, slots: Sequence[int], params: Sequence[ImageParams], plan_offsets: Sequence[int]) -> None:
        """Set slots up for images that begin: x_T is a function of seed and image index."""
        seeds, image_indices = [p.seed for p in params], [p.image_index for p in params]
        check_range("seed", min(seeds), max(seeds), MAX_SEED)
        check_range("image_index", min(image_indices), max(image_indices), MAX_WORD)
        cfg_scales = np.array([p.cfg_scale for p in params], dtype=np.float32)
        classifier_scales = np.array([p.classifier_scale for p in params], dtype=np.float32)
        index = self.integers(slots)
        self.seed[index] = self.integers(seeds)
        self.image_index[index] = self.integers(image_indices)
        self.y[index] = self.integers([p.class_index or 0 for p in params])
        self.cfg_scale[index] = self.send(cfg_scales)
        self.classifier_scale[index] = self.send(classifier_scales)
        self.is_guided[list(slots)] = cfg_scales != 1
        self.is_classified[list(slots)] = classifier_scales != 0
        self.plan_offset[index] = self.integers(plan_offsets)
        self.step[index] = self._zeros((len(slots),), self._xp.int64)  # a bare 0 would be copied, and waited for
        self.x[index] = normal(
            self.seed[index], self.image_index[index], self.step[index], STREAM_X_T, self.image_shape
        )
        self.x0[index] = self._zeros((len(slots), *self.image_shape), self._xp.float32)

    def save(self, slots: Sequence[int]) -> list[SavedSlot]:
        """Copy what slots hold to host memory, bit for bit."""
        index = self.integers(slots)
        rows = {name: to_numpy(getattr(self, name)[index]) for name in BY_SLOT}
        # Copies, or one image that stays away would keep the memory of all that left with it
        return [SavedSlot({name: array[k].copy() for name, array in rows.items()}) for k in range(len(slots))]

    def load(self, slots: Sequence[int], saved: Sequence[SavedSlot]) -> None:
        """Put what `save` returned into slots, bit for bit; perhaps other ones."""
        index = self.integers(slots)
        for name in BY_SLOT:
            rows = np.stack([state.arrays[name] for state in saved])
            getattr(self, name)[index] = self.send(rows)
        self.is_guided[list(slots)] = [state.arrays["cfg_scale"] != 1 for state in saved]
        self.is_classified[list(slots)] = [state.arrays["classifier_scale"] != 0 for state in saved]

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> A:
        array: A = self._xp.zeros(shape, dtype=dtype, device=self._device)
        return array
