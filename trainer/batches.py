"""Batches: the inputs of a train step, as a pure function of (seed, position in the data).

Position p is the p-th image of the run, repetitions included. Noise, crops, flips and dropped labels of an image are
keyed by its position (`diffusion/noise.py`), so that neither the batch size nor the number of processes changes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.conditioning import enlarged
from diffusion.config import ClassifierConfig, ModelConfig
from diffusion.noise import MAX_WORD, STREAM_AUGMENTATION, STREAM_TRAINING, normal, uniform
from trainer.config import TrainConfig
from trainer.data import Dataset, IntArray, batch_indices, network_input
from trainer.timestep_sampler import TimestepSampler

CROP_DRAWS = 3
"""Uniform numbers per image that a data set gets for its random crop."""
FLIP, LABEL = CROP_DRAWS, CROP_DRAWS + 1
"""Columns of an image's uniform numbers that decide whether it is mirrored, and whether its label is dropped."""


class Images(NamedTuple):
    """The part of a batch that does not depend on the losses so far, in host memory."""

    positions: IntArray
    """int64 [B]."""
    x0: Tensor
    """[B, C, H, W] in [-1, 1]."""
    y: Tensor | None
    """int64 [B], num_classes where the label is dropped; None: unconditional."""
    cond: Tensor | None
    """Conditioning images of pairs, [B, C', H, W] in [-1, 1]; None: the data are no pairs."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The inputs of one train step, on the device."""

    positions: IntArray
    """Positions of the images in the run, int64 [B]; in host memory."""
    x0: Tensor
    """Images [B, C, H, W] in [-1, 1]."""
    y: Tensor | None
    """int64 [B], num_classes where the label is dropped; None: unconditional."""
    t: Tensor
    """int64 [B]."""
    weights: Tensor
    """Weights of the losses, float32 [B]."""
    noise: Tensor
    """Standard normal, shaped like x0."""
    conditions: Mapping[str, Tensor]
    """Further inputs of the network, by the name of its argument."""

    def __len__(self) -> int:
        return len(self.x0)

    def rows(self, rows: slice) -> Batch:
        """Return some of the rows."""
        return replace(
            self,
            positions=self.positions[rows],
            x0=self.x0[rows],
            y=None if self.y is None else self.y[rows],
            t=self.t[rows],
            weights=self.weights[rows],
            noise=self.noise[rows],
            conditions={name: tensor[rows] for name, tensor in self.conditions.items()},
        )


class Batches:
    """The batches of one process: of each global batch it takes the rows rank, rank + world, ...

    Args:
        config: of the run, resolved.
        dataset: the data, the same in each process.
        timestep_sampler: draws the timesteps of the global batch; its state must be the same in each process.
        device: where batches are used.
        rank: of this process.
        world: number of processes; divides the batch size.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        timestep_sampler: TimestepSampler,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._timestep_sampler = timestep_sampler
        self._device = torch.device(device)
        self._mine = slice(rank, None, world)

    def images(self, first: int) -> Images:
        """Read the images of the batch at positions first, first + 1, ...; may be called in another thread.

        Raises:
            DataError: an image cannot be read.
        """
        config = self._config
        indices = batch_indices(config.seed, first, config.batch_size, len(self._dataset.labels))[self._mine]
        positions = np.arange(first, first + config.batch_size, dtype=np.int64)[self._mine]
        chances = uniform(config.seed, *_words(positions), STREAM_AUGMENTATION, LABEL + 1)
        x0, cond = read_pairs(self._dataset, indices, chances[:, :CROP_DRAWS] if config.data.random_crop else None)
        if config.horizontal_flip:
            mirrored = torch.from_numpy(chances[:, FLIP] < 0.5)[:, None, None, None]
            x0 = torch.where(mirrored, x0.flip(-1), x0)
            cond = None if cond is None else torch.where(mirrored, cond.flip(-1), cond)
        y = None
        if config.model.num_classes is not None:
            y = torch.from_numpy(self._dataset.labels[indices])
            if isinstance(config.model, ModelConfig) and config.model.null_class:
                dropped = torch.from_numpy(chances[:, LABEL] < config.label_dropout)
                y = torch.where(dropped, config.model.num_classes, y)
        pinned = (None if tensor is None else _pinned(tensor, self._device) for tensor in (y, cond))
        return Images(positions, _pinned(x0, self._device), *pinned)

    def complete(self, first: int, images: Images) -> Batch:
        """Add timesteps, which may depend on the losses so far, and noise; copy everything to the device.

        Args:
            first: position of the global batch.
            images: `images(first)`.
        """
        rng = np.random.default_rng((self._config.seed, 1, first))
        t, weights = self._timestep_sampler.sample(rng, self._config.batch_size)
        x0 = self._copy(images.x0)
        cond = None if images.cond is None else self._copy(images.cond)
        return Batch(
            positions=images.positions,
            x0=x0,
            y=None if images.y is None else self._copy(images.y),
            t=self._copy(torch.from_numpy(t[self._mine])),
            weights=self._copy(torch.from_numpy(weights[self._mine])),
            noise=noise_at(self._config.seed, images.positions, STREAM_TRAINING, x0),
            conditions=conditions_of(self._config.model, x0, cond),
        )

    def draw(self, first: int) -> Batch:
        """Return the batch at a position."""
        return self.complete(first, self.images(first))

    def _copy(self, tensor: Tensor) -> Tensor:
        return _to_device(tensor, self._device)


def read_pairs(
    dataset: Dataset, indices: IntArray, draws: np.ndarray[Any, Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Read images as float32 [B, C, H, W] in [-1, 1], and their conditioning images, if the data have them.

    Args:
        dataset: its images are uint8, or float32 in [-1, 1].
        indices: int64 [B].
        draws: uniform numbers in [0, 1) for random crops, [B, 3], equal for both of a pair; None: no random crop.

    Raises:
        DataError: an image cannot be read.
    """
    if dataset.conditions is None:
        return torch.from_numpy(network_input(dataset.images(indices, draws))), None
    images, conditions = dataset.conditions.pairs(indices, draws)
    return torch.from_numpy(network_input(images)), torch.from_numpy(network_input(conditions))


def noise_at(seed: int, positions: IntArray, stream: int, like: Tensor) -> Tensor:
    """Return the noise of images by their position, shaped like `like` and on its device."""
    low, high = (_to_device(torch.from_numpy(words), like.device) for words in _words(positions))
    _, channels, height, width = like.shape
    return normal(torch.full_like(low, seed), low, high, stream, (channels, height, width))


def conditions_of(model: ModelConfig | ClassifierConfig, x0: Tensor, cond: Tensor | None = None) -> dict[str, Tensor]:
    """Return further inputs of the network.

    Args:
        model: the network.
        x0: the images.
        cond: conditioning images of pairs; None: the data are no pairs.

    Returns:
        `cond`: those of pairs; for super-resolution the images' area means, enlarged. Empty if the network takes none.
    """
    if not isinstance(model, ModelConfig) or model.cond_shape is None:
        return {}
    if model.low_res_size is None:
        assert cond is not None  # noqa: S101  # a run, or an evaluation, refuses data without them
        return {"cond": cond}
    low_res = F.interpolate(x0, model.low_res_size, mode="area")
    return {"cond": enlarged(low_res, model.image_height, model.image_width)}


def seed_dropout(seed: int, batch: Batch) -> None:
    """Seed torch's generators for the forward pass of a (micro-)batch, from the position of its first image."""
    state = np.random.SeedSequence((seed, 2, int(batch.positions[0]))).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in page-locked memory, from which a device copies without making the host wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without making the host wait."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _words(positions: IntArray) -> tuple[IntArray, IntArray]:
    return positions & MAX_WORD, positions >> 32
