"""How an evaluation reads real images: as they were read for the training of the model, with their conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion.config import CheckpointConfig
from formats.checkpoint_config import describe_validation_error
from trainer.data import DataConfig, Dataset, open_dataset
from trainer.evaluation.errors import EvaluationError
from trainer.objective import EIGHT_BITS

COND_FIELDS = ("cond_range", "cond_column")
"""Fields of `DataConfig` that say how conditioning images are read."""


def reading_of(config: CheckpointConfig) -> DataConfig:
    """Return how images were read when a model was trained.

    Those of a model without a record, which was imported, are read by the defaults, in the units of its configuration.

    Raises:
        EvaluationError: the record has options or values that this version does not know.
    """
    recorded: Any = config.provenance.get("train_config")
    found = recorded.get("data") if isinstance(recorded, dict) else None
    if found is None:
        found = {} if config.value_range == EIGHT_BITS else {"value_range": config.value_range}
    try:
        return DataConfig.model_validate(found)
    except ValidationError as error:
        raise EvaluationError(
            "this version cannot read images as the training of the model did (train_config.data in its config.json): "
            f"{describe_validation_error(error)}"
        ) from error


def with_reading(config: CheckpointConfig, changes: Mapping[str, Any]) -> CheckpointConfig:
    """Return the configuration of a model whose images are to be read with other options than in its training.

    Args:
        config: of the model.
        changes: values by dotted name, as `data.background`.

    Raises:
        EvaluationError: a name is no option of the data, or a value is not allowed.
    """
    if not changes:
        return config
    allowed = [f"data.{name}" for name in DataConfig.model_fields]
    if unknown := [name for name in changes if name not in allowed]:
        raise EvaluationError(
            f"--set takes options of the data here, because a trained model determines all others; got {unknown[0]!r}; "
            f"allowed: {', '.join(allowed)}"
        )
    values = {name.removeprefix("data."): value for name, value in changes.items()}
    try:
        reading = DataConfig.model_validate({**reading_of(config).model_dump(), **values})
    except ValidationError as error:
        raise EvaluationError(f"--set: {describe_validation_error(error)}") from error
    recorded = {**config.provenance.get("train_config", {}), "data": reading.model_dump(mode="json")}
    return config.replace(provenance={**config.provenance, "train_config": recorded})


def open_real(path: Path, config: CheckpointConfig, *, labelled: bool = False) -> Dataset:
    """Open real images without their conditioning images.

    Raises:
        DataError: the data cannot be read.
    """
    model = config.model
    return open_dataset(path, model.image_size, model.image_channels, reading_of(config), labelled=labelled)


def open_inputs(
    path: Path, configs: Sequence[CheckpointConfig], cond: Path | None = None, *, labelled: bool
) -> tuple[Dataset, DataConfig]:
    """Open real images for models of one image shape, with the conditioning images that some of them take.

    Args:
        path: of the data.
        configs: of the models; images are read as for the first one, conditioning images as for the first that takes
            some.
        cond: folder or file of the conditioning images; None: they are in the same file.
        labelled: whether labels are needed.

    Returns:
        The data, and how they are read.

    Raises:
        EvaluationError: the models do not take the same conditioning images, or none while `cond` is given.
        DataError: the data cannot be read.
    """
    reading, channels = reading_of(configs[0]), 0
    conditioned = [config for config in configs if config.model.cond_channels]
    if conditioned:
        reading, channels = _reading_of_pairs(reading, conditioned), conditioned[0].model.cond_channels
    elif cond is not None:
        upsampler = any(config.model.low_res_size is not None for config in configs)
        own = "; an upsampler's are made from the images" if upsampler else ""
        raise EvaluationError(
            f"--cond must be absent, because model.cond_channels is 0: the model takes no conditioning images from a "
            f"file{own}"
        )
    model = configs[0].model
    dataset = open_dataset(
        path, model.image_size, model.image_channels, reading, labelled=labelled, cond_channels=channels, cond=cond
    )
    return dataset, reading


def _reading_of_pairs(reading: DataConfig, conditioned: Sequence[CheckpointConfig]) -> DataConfig:
    """Return a way of reading images, with that of the conditioning images of some models."""
    first, *others = conditioned
    wanted = _conditions_of(first)
    for other in others:
        if (found := _conditions_of(other)) != wanted:
            name = next(name for name in wanted if found[name] != wanted[name])
            raise EvaluationError(
                f"models must have equal {name}, because all get the same conditioning images: {wanted[name]} and "
                f"{found[name]}; evaluate them one by one"
            )
    recorded = reading_of(first)
    return reading.replace(**{name: getattr(recorded, name) for name in COND_FIELDS})


def _conditions_of(config: CheckpointConfig) -> dict[str, Any]:
    return {"model.cond_channels": config.model.cond_channels, "cond_range": config.cond_channel_ranges}


def content_of(dataset: Dataset) -> dict[str, str | int]:
    """Return the description of data without the names of files and folders: equal for equal content."""
    names = {f"{side}{name}" for side in ("", "cond_") for name in ("file", "folder", "dataset")}
    return {name: value for name, value in dataset.description.items() if name not in names}
