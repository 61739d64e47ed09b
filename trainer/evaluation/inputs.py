"""The images of a data set as inputs of a model: with the labels and conditioning images that it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.batches import conditions_of, read_pairs
from trainer.data import DataError, Dataset, IntArray
from trainer.evaluation.subject import Subject, model_labels


class Inputs(NamedTuple):
    """Images with what the network gets beside x_t and the timestep, on the model's device."""

    x0: Tensor
    """[n, C, H, W] in [-1, 1]."""
    y: Tensor | None
    """int64 [n]; None for an unconditional model."""
    conditions: dict[str, Tensor]
    """Further inputs of the network, by the name of its argument."""

    def rows(self, rows: Tensor) -> Inputs:
        """Return some of the rows, by their numbers, int64 on the same device."""
        return Inputs(
            self.x0[rows],
            None if self.y is None else self.y[rows],
            {name: tensor[rows] for name, tensor in self.conditions.items()},
        )


class RealInputs:
    """Reads images of a data set for a model.

    Raises:
        DataError: the classes of the data are not those of the model, or the data lack the conditioning images that it
            takes.
    """

    def __init__(self, subject: Subject, dataset: Dataset) -> None:
        self._model = subject.config.model
        if self._model.cond_channels and dataset.conditions is None:
            raise DataError(
                f"model.cond_channels of {subject.name} is {self._model.cond_channels}, and these data are images "
                "without conditioning images"
            )
        self._dataset = dataset
        self._labels = model_labels(subject.name, subject.config, dataset)
        self._device = next(subject.networks[0].parameters()).device

    def read(self, indices: IntArray) -> Inputs:
        """Read images, cropped in the centre.

        Raises:
            DataError: an image cannot be read.
        """
        x0, cond = read_pairs(self._dataset, indices)
        conditions = conditions_of(self._model, x0, cond)
        y = None if self._labels is None else torch.from_numpy(self._labels[indices]).to(self._device)
        return Inputs(x0.to(self._device), y, {name: tensor.to(self._device) for name, tensor in conditions.items()})
