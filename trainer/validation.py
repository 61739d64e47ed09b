"""Validation: the loss of the averaged weights on held-out images, with fixed timesteps and noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.noise import STREAM_VALIDATION
from diffusion.quoting import printable
from trainer.batches import Batch, conditions_of, noise_at, read_pairs
from trainer.config import TrainConfig
from trainer.data import Dataset, IntArray
from trainer.data.listing import shorten
from trainer.log import Window
from trainer.objective import Objective
from trainer.optimisation import Optimisation
from trainer.resume import data_differences


def held_out(
    config: TrainConfig, dataset: Dataset, validation: Dataset | None = None
) -> tuple[Dataset, Dataset | None]:
    """Return the images for training and the held-out ones: a share of the data, or some of a data set of their own.

    Both are chosen by the seed.

    Args:
        config: of the run, with `validation_share`.
        dataset: the data.
        validation: held-out data, accepted by `refuse_unfit`; None: none but the share.

    Raises:
        ValueError: no image would be left for training.
    """
    if validation is not None:
        return dataset, validation.part(_shuffled(config, validation)[: config.validation_images])
    if config.validation_share == 0:
        return dataset, None
    count = len(dataset.labels)
    shuffled = _shuffled(config, dataset)
    held = max(1, round(config.validation_share * count))
    if held >= count:
        raise ValueError(f"validation_share={config.validation_share:g} leaves none of {count} images for training")
    return dataset.part(np.sort(shuffled[held:])), dataset.part(shuffled[: min(held, config.validation_images)])


def held_out_anew(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether changed data have other held-out images than before, so far as their descriptions tell.

    The images are drawn by their places in the data, which an image that was repaired under its name keeps.
    """
    listing = "listing_sha256"
    return listing not in now or before.get(listing) != now[listing]


def _shuffled(config: TrainConfig, dataset: Dataset) -> IntArray:
    return np.random.default_rng((config.seed, 3)).permutation(len(dataset.labels))


def refuse_unfit(config: TrainConfig, dataset: Dataset, validation: Dataset) -> None:
    """Check that the loss on held-out data says something about a run.

    Raises:
        ValueError: a share of the data is held out too, the held-out data are the data themselves, or they have other
            classes, or other sizes.
    """
    if config.validation_share:
        raise ValueError(f"validation_share must be 0 with held-out data of their own; got {config.validation_share:g}")
    if not data_differences(dataset.description, validation.description):
        raise ValueError("the data for validation are those for training; hold out a part with validation_share")
    if config.class_conditional and validation.class_names != dataset.class_names:
        raise ValueError(
            f"the data for validation must have the classes of the data, in the same order: {_listed(dataset)}; "
            f"got {_listed(validation)}"
        )
    size = dataset.sizes[0]
    if (dataset.sizes == size).all() and not (validation.sizes == size).all():
        other = validation.sizes[(validation.sizes != size).any(axis=1)][0]
        raise ValueError(
            f"all images for training are {size[1]}x{size[0]}, and one for validation is {other[1]}x{other[0]}: they "
            "would be scaled differently, so their losses could not be compared"
        )


def _listed(dataset: Dataset) -> str:
    return shorten(map(printable, dataset.class_names)) or "none"


class Validation:
    """The losses of held-out images: each at one timestep and with one noise, the same ones at every validation."""

    def __init__(self, config: TrainConfig, held: Dataset, objective: Objective, optimisation: Optimisation) -> None:
        self._config = config
        self._autocast = optimisation.autocast
        self._held = held
        self._objective = objective
        self._device = optimisation.device
        self._rows_at_once = optimisation.rows_at_once

    def losses(self, weights: Mapping[str, Tensor], stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Return the rounded mean of each loss over the held-out images; empty if `stop` returned True.

        Raises:
            DataError: an image cannot be read.
        """
        network = self._objective.build().to(self._device).eval()
        network.load_state_dict(dict(weights))
        window = Window(self._objective.by_quartile)
        size = self._rows_at_once
        with torch.inference_mode():
            for first in range(0, len(self._held.labels), size):
                if stop():
                    return {}
                batch = self._batch(np.arange(first, min(first + size, len(self._held.labels)), dtype=np.int64))
                losses = self._objective.losses(self._autocast(network), batch)
                window.add(losses, batch.t, torch.zeros((), device=self._device), self._objective.num_steps)
        of_training = ("grad_norm", "data_wait", "images_per_second")
        return {name: value for name, value in window.summary().items() if name not in of_training}

    def _batch(self, indices: IntArray) -> Batch:
        x0, cond = read_pairs(self._held, indices)
        x0, cond = x0.to(self._device), None if cond is None else cond.to(self._device)
        t = ((indices + 0.5) * self._objective.num_steps / len(self._held.labels)).astype(np.int64)
        labelled = self._config.model.num_classes is not None
        return Batch(
            positions=indices,
            x0=x0,
            y=torch.from_numpy(self._held.labels[indices]).to(self._device) if labelled else None,
            t=torch.from_numpy(t).to(self._device),
            weights=torch.ones(len(indices), device=self._device),
            noise=noise_at(self._config.seed, indices, STREAM_VALIDATION, x0),
            conditions=conditions_of(self._config.model, x0, cond),
        )


def read_losses(path: Path, name: str) -> list[float]:
    """Return one loss (or `images`) of every validation so far, oldest first; empty if there was none."""
    if not path.exists():
        return []
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]


def worse_in_a_row(losses: list[float]) -> int:
    """Return how many of the last losses were not below the best one; 0 if the last is the best, or there is none."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
