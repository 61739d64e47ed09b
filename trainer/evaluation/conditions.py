"""The conditioning images, and the classes, of generated images: those of real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffusion.config import CheckpointConfig
from diffusion.update import from_uint8_reversibly
from trainer.batches import conditions_of
from trainer.data import Dataset, Float32Array, IntArray, Uint8Array, network_input
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.reading import content_of, open_inputs
from trainer.evaluation.subject import model_labels


class RealConditions:
    """Generated image k has the conditioning image, and the class, of a real image (`real_images`).

    Pixels of 8 bits become the values that the service gives to the network for a picture of them.
    """

    def __init__(self, config: CheckpointConfig, dataset: Dataset, count: int) -> None:
        """Choose the real images.

        Args:
            config: of the model, which takes conditioning images.
            dataset: from `open_inputs`.
            count: number of generated images.

        Raises:
            DataError: the classes of the data are not those of the model.
        """
        self._model = config.model
        self._dataset = dataset
        self._indices = real_images(count, len(dataset.labels))
        self.description: dict[str, str | int] = content_of(dataset)
        labels = model_labels("the model", config, dataset)
        self.labels: list[int] | None = None if labels is None else labels[self._indices].tolist()
        """Class of each generated image; None for an unconditional model."""

    def of(self, images: range) -> Float32Array:
        """Return the conditioning images of some generated images, as the network takes them, [n, C', H, W].

        Raises:
            DataError: an image cannot be read.
        """
        indices = self._indices[images.start : images.stop]
        if self._dataset.conditions is not None:
            return _values(self._dataset.conditions.images(indices))
        cond: Float32Array = conditions_of(self._model, torch.from_numpy(_values(self._dataset.images(indices))))[
            "cond"
        ].numpy()
        return cond


def real_images(count: int, available: int) -> IntArray:
    """Return the real image of each generated one, int64 [count], as indices of the data.

    With as many images as the data, k belongs to k. Fewer are spread evenly over the data, which may be in the order of
    their classes; more begin again with the first one.
    """
    k = np.arange(count, dtype=np.int64)
    return k * available // count if count <= available else k % available


def open_conditions(
    config: CheckpointConfig, data: Path | None, cond: Path | None, count: int, *, classes: str | None, guided: bool
) -> RealConditions | None:
    """Open the conditioning images of generated images; None for a model that takes none.

    Args:
        config: of the model.
        data: real images.
        cond: their conditioning images; None: they are in the same file, or are made from the images.
        count: number of generated images.
        classes: what the user chose for their classes; None: nothing.
        guided: whether a classifier guides them.

    Raises:
        EvaluationError: an option does not go with the model; the message names it.
        DataError: the data cannot be read, or do not fit the model.
    """
    model = config.model
    if model.cond_shape is None:
        if cond is not None:
            raise EvaluationError(
                "--cond must be absent: the model takes no conditioning image (model.cond_channels is 0)"
            )
        return None
    field = "model.cond_channels" if model.low_res_size is None else "model.low_res_size"
    if data is None:
        raise EvaluationError(
            f"--data is required by a model with {field}: generated images have the conditioning images of the data, "
            "and a file of --reference has none"
        )
    if classes == "balanced":
        raise EvaluationError(
            f"--classes must be data, or absent, for a model with {field}: a generated image has the class of the real "
            "image whose conditioning image it has; got balanced"
        )
    if guided and model.num_classes is None:
        raise EvaluationError(
            f"--classifier-scale must be 0, or absent, for a model with {field} and without classes: the classifier "
            "would guide every image to a class that its conditioning image does not have"
        )
    dataset, _ = open_inputs(data, [config], cond, labelled=model.num_classes is not None)
    return RealConditions(config, dataset, count)


def _values(pixels: Uint8Array | Float32Array) -> Float32Array:
    if pixels.dtype == np.uint8:
        return from_uint8_reversibly(pixels.astype(np.uint8, copy=False))
    return network_input(pixels)
