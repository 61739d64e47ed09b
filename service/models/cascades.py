"""Cascades: two models that are served as one. The finished images of the base condition the upsampler."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from diffusion.quoting import quoted
from service.errors import ModelError
from service.models.served_model import ServedModel
from service.settings import Cascade


def linked(cascade: Cascade, models: Mapping[str, ServedModel]) -> ServedModel:
    """Return a cascade as a served model.

    Args:
        cascade: to link.
        models: the served models by name.

    Raises:
        ModelError: a model is missing, is a cascade itself, or the two do not fit together.
    """
    for name in cascade.models:
        if name not in models or models[name].stages is not None:
            raise ModelError(f"cascade {cascade.name}: no model {quoted(name)} is served")
    base, upsampler = models[cascade.base], models[cascade.upsampler]
    wanted, given = upsampler.config.model.low_res_shape, base.config.model.image_shape
    if wanted is None:
        raise ModelError(f"cascade {cascade.name}: model {quoted(upsampler.name)} is not an upsampler")
    if wanted != given:
        raise ModelError(
            f"cascade {cascade.name}: {quoted(upsampler.name)} takes images of {_named(wanted)}, {quoted(base.name)} "
            f"makes images of {_named(given)}"
        )
    if upsampler.config.channel_ranges != base.config.channel_ranges:
        raise ModelError(f"cascade {cascade.name}: the models have different value ranges")
    if base.config.model.cond_shape is not None:
        raise ModelError(f"cascade {cascade.name}: the base {quoted(base.name)} needs a conditioning image itself")
    if upsampler.classes is not None and not _have_equal_classes(base, upsampler):
        raise ModelError(f"cascade {cascade.name}: {quoted(upsampler.name)} has other classes than {quoted(base.name)}")
    both = f"{base.numerics_id} {upsampler.numerics_id}"
    return replace(
        base,
        name=cascade.name,
        numerics_id=hashlib.sha256(both.encode()).hexdigest()[: len(base.numerics_id)],
        backend=f"{base.backend}; {upsampler.backend}",
        loaded_at=max(base.loaded_at, upsampler.loaded_at),
        stages=(base, upsampler),
    )


def _have_equal_classes(base: ServedModel, upsampler: ServedModel) -> bool:
    """Compare the names, or only the number of classes if one of the models has no names."""
    names = [model.config.class_names for model in (base, upsampler)]
    return len(base.class_names or ()) == len(upsampler.class_names or ()) and (None in names or names[0] == names[1])


def _named(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{width} x {height} pixels of {channels} channel{'' if channels == 1 else 's'}"
