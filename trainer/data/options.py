"""DataConfig: options that determine how an image is converted to pixels."""

from __future__ import annotations

from typing import Literal, Self

from PIL import ImageColor
from pydantic import FiniteFloat, field_validator, model_validator

from diffusion.config import FrozenConfig

SmallImages = Literal["frame", "enlarge"]


class DataConfig(FrozenConfig):
    """How images are read; docs/training.md describes each choice."""

    small_images: SmallImages = "frame"
    """How an image is handled whose shorter side is smaller than the model: `frame` puts it in the middle of a
    black square without enlarging it; `enlarge` scales it up until the shorter side fits, as OpenAI's code does."""
    random_crop: bool = False
    """Scale and crop at random, as guided-diffusion's `random_crop_arr` does: a square of at least 0.8 times the
    shorter side. False: crop the centre."""
    background: str = "white"
    """Colour behind transparent pixels: a name or #rrggbb. Most viewers and every browser show white."""
    value_range: tuple[FiniteFloat, FiniteFloat] | None = None
    """Values that become black and white in grey images of more than 8 bits; None: the full range of a 16-bit file,
    0..65535. Files of 32 bits and of floating-point numbers have no default range and need this option."""

    @field_validator("background")
    @classmethod
    def _check_background(cls, value: str) -> str:
        try:
            colour = ImageColor.getrgb(value)
        except ValueError as error:
            raise ValueError(f"must be a colour such as white, black or #808080; got {value!r}") from error
        if len(colour) == 4:
            raise ValueError(f"must be a colour without transparency, such as white or #808080; got {value!r}")
        return value

    @model_validator(mode="after")
    def _check_value_range(self) -> Self:
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be [black, white] with black < white; got {list(self.value_range)}")
        return self
