"""SlotTable: the arrays of a model's images in flight, one slot each, and of their plans. Allocated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.config import CheckpointConfig
from diffusion.noise import STREAM_X_T
from diffusion.noise_torch import normal
from diffusion.plans import PLAN_COLUMNS, SamplingPlan
from service.engine.request import ImageParams


class SlotTable:
    """Tensors by slot id and by plan line; which ids are in use is the scheduler's business."""

    def __init__(self, config: CheckpointConfig, num_slots: int, plan_lines: int) -> None:
        model = config.model
        self.image_shape = (model.image_channels, model.image_size, model.image_size)
        self.x = torch.zeros(num_slots, *self.image_shape)
        """x_t."""
        self.x0 = torch.zeros(num_slots, *self.image_shape)
        """The previous step's predicted x0, for multistep solvers."""
        self.step = torch.zeros(num_slots, dtype=torch.int64)
        """Sampling steps done."""
        self.plan_offset = torch.zeros(num_slots, dtype=torch.int64)
        self.y = torch.zeros(num_slots, dtype=torch.int64)
        """Label; 0 where the model has none."""
        self.cfg_scale = torch.ones(num_slots)
        self.seed = torch.zeros(num_slots, dtype=torch.int64)
        self.image_index = torch.zeros(num_slots, dtype=torch.int64)
        self.plan = torch.zeros(plan_lines, len(PLAN_COLUMNS))
        """Lines of the sampling plans."""
        self.emb_t = torch.zeros(plan_lines, model.emb_channels)
        """The embedded timestep of each plan line."""

    def write_plan(self, offset: int, plan: SamplingPlan, emb_t: Tensor) -> None:
        """Put a plan's lines, and their embedded timesteps, into the table."""
        lines = slice(offset, offset + plan.num_steps)
        self.plan[lines] = torch.from_numpy(plan.table.copy())
        self.emb_t[lines] = emb_t

    def start(self, slots: Sequence[int], params: Sequence[ImageParams], plan_offsets: Sequence[int]) -> None:
        """Set slots up for images that begin: x_T is a function of seed and image index."""
        index = torch.tensor(slots)
        self.seed[index] = torch.tensor([p.seed for p in params])
        self.image_index[index] = torch.tensor([p.image_index for p in params])
        self.y[index] = torch.tensor([p.class_index or 0 for p in params])
        self.cfg_scale[index] = torch.tensor([p.cfg_scale for p in params], dtype=torch.float32)
        self.plan_offset[index] = torch.tensor(plan_offsets)
        self.step[index] = 0
        self.x[index] = normal(
            self.seed[index], self.image_index[index], self.step[index], STREAM_X_T, self.image_shape
        )
        self.x0[index] = 0.0
