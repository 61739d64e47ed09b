"""The torch runner: gather, one network call, guidance, noise, one fused update, scatter."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.guidance import classifier_free
from diffusion.noise import STREAM_STEP
from diffusion.noise_torch import normal
from diffusion.plans import build_plan
from diffusion.unet import split_output
from diffusion.update import PlanRows, advance, to_uint8
from service.backends.base import Denoiser
from service.backends.self_test import invariant_batch_sizes
from service.engine.config import EngineConfig
from service.engine.request import ImageParams, PlanKey, Start
from service.engine.slots import SlotTable

log = logging.getLogger(__name__)


class TorchRunner:
    """Implements `Runner` with a `SlotTable` on the CPU."""

    def __init__(self, denoiser: Denoiser, config: EngineConfig) -> None:
        self.numerics_id = _numerics_id(denoiser, config.max_rows)
        self.batch_sizes: tuple[int, ...] = (config.max_rows,)
        """Rows a network call may have; the self-test finds more than the full width."""
        self._denoiser = denoiser
        self._max_rows = config.max_rows
        self._channels = denoiser.config.model.image_channels
        self._null_class = denoiser.config.model.num_classes or 0
        self._conditional = denoiser.config.model.num_classes is not None
        self._slots = SlotTable(denoiser.config, config.num_slots, config.plan_lines)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Find the batch sizes that give a row the same bits as the full width, then take a real step."""
        self.batch_sizes = invariant_batch_sizes(self._denoiser, self._max_rows)
        params = ImageParams(
            plan=PlanKey(sampler="ancestral", spec="2"), num_steps=2, seed=0, image_index=0, class_index=0
        )
        self.start([Start(slot=0, params=params, plan_offset=0, write_plan=True)])
        self.step([0])
        self.read([0])
        log.info("batch sizes that give a row equal bits: %s", ", ".join(map(str, self.batch_sizes)))

    @torch.inference_mode()
    def start(self, starts: Sequence[Start]) -> None:
        """Set slots up; plans are computed here, once for all images that share one."""
        for start in starts:
            if start.write_plan:
                key = start.params.plan
                plan = build_plan(self._denoiser.config.diffusion, key.sampler, key.spec, key.eta)
                t_model = torch.from_numpy(plan.column("t_model").copy())
                self._slots.write_plan(start.plan_offset, plan, self._denoiser.embed_timesteps(t_model))
        if starts:
            self._slots.start([s.slot for s in starts], [s.params for s in starts], [s.plan_offset for s in starts])

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> list[bool]:
        """Advance the images in these slots by one step."""
        table = self._slots
        index = torch.tensor(slots)
        x_t, step, scale = table.x[index], table.step[index], table.cfg_scale[index]
        line = table.plan_offset[index] + step

        out = self._network(x_t, table.emb_t[line], table.y[index], scale)
        prediction, var_values = split_output(out, self._channels)
        z = normal(table.seed[index], table.image_index[index], step, STREAM_STEP, table.image_shape)
        rows = PlanRows.from_lines(table.plan[line])
        result = advance(rows, x_t, table.x0[index], prediction, var_values, z, torch.zeros_like(x_t))

        table.x[index] = result.x_prev
        table.x0[index] = result.x0
        table.step[index] = step + 1
        ok: list[bool] = result.ok.tolist()
        return ok

    def padded_rows(self, rows: int) -> int:
        """Round up to the next batch size that may be run."""
        return self.batch_sizes[bisect_left(self.batch_sizes, rows)]

    def read(self, slots: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Turn finished images into pixels."""
        return to_uint8(self._slots.x[torch.tensor(slots)])

    def _network(self, x_t: Tensor, emb_t: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        """Call the network on [n] images plus a second row, with the null class, for each guided one."""
        count = len(x_t)
        guided = torch.nonzero(scale != 1).flatten()
        rows = torch.cat([torch.arange(count), guided])
        labels = torch.cat([y, torch.full_like(guided, self._null_class)])
        padding = self.padded_rows(len(rows)) - len(rows)
        out = self._denoiser(
            F.pad(x_t[rows], (0, 0, 0, 0, 0, 0, 0, padding)),
            F.pad(emb_t[rows], (0, 0, 0, padding)),
            F.pad(labels, (0, padding)) if self._conditional else None,
        )
        if len(guided) == 0:
            return out[:count]
        uncond_row = torch.arange(count)
        uncond_row[guided] = torch.arange(count, len(rows))
        return classifier_free(out[uncond_row], out[:count], scale, self._channels)


def _numerics_id(denoiser: Denoiser, max_rows: int) -> str:
    """Add what the runner contributes: the self-test compares with its own full width, at its number of threads."""
    depends_on = f"{denoiser.numerics_id}\nwidth {max_rows}\nthreads {torch.get_num_threads()}"
    return hashlib.sha256(depends_on.encode()).hexdigest()[:16]
