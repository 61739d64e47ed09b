"""DataConfig: options that determine how an image is converted to pixels."""

from __future__ import annotations

from typing import ClassVar, Literal, Self, cast

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from diffusion.config import FrozenConfig, ValueRange, ValueRanges, check_ranges

SmallImages = Literal["frame", "enlarge"]
ClassFrom = Literal["folder", "name"]
Unreadable = Literal["fail", "skip"]
OutsideRange = Literal["fail", "clip"]


class DataConfig(FrozenConfig):
    """How images are read; docs/training.md describes each choice."""

    title: ClassVar[str] = "data"
    """What is read, in messages; below, the fields that decide about it, and its array in an npz file."""
    range_field: ClassVar[str] = "data.value_range"
    channels_field: ClassVar[str] = "model.image_channels"
    column_field: ClassVar[str] = "data.image_column"
    array: ClassVar[str] = "images"
    counterpart: ClassVar[str] = "conditioning image"
    """What belongs to each image, if the data are pairs."""

    class_from: ClassFrom = "folder"
    """What a file's class is: the subfolder it is in, or the part of its name before the first underscore, as in
    OpenAI's `<class>_<number>.png`."""
    unreadable: Unreadable = "fail"
    """What happens to an image that cannot be read: `fail` ends the run; `skip` reports and leaves out those that are
    found before the first step, and later ones are replaced by another image of their class. Of pairs, both images."""
    workers: int | None = Field(default=None, ge=1, le=256)
    """Threads that decode images; None: one per processor, at most 8. Does not affect the images."""
    image_column: str | None = None
    """Column of images of a Hugging Face data set; None: the only column of that kind."""
    cond_column: str | None = None
    """Column of conditioning images of a Hugging Face data set."""
    label_column: str | None = None
    """Column of labels of a Hugging Face data set; None: the only column of classes, or `label`."""
    small_images: SmallImages = "frame"
    """How an image is handled whose shorter side is smaller than the model: `frame` puts it in the middle of a
    black square without enlarging it; `enlarge` scales it up until the shorter side fits, as OpenAI's code does."""
    random_crop: bool = False
    """Scale and crop at random, as guided-diffusion's `random_crop_arr` does: a square of at least 0.8 times the
    shorter side. False: crop the centre."""
    background: str = "white"
    """Colour behind transparent pixels: a name or #rrggbb. Most viewers and every browser show white."""
    value_range: ValueRanges | None = None
    """Values that become black and white, -1 and 1 for the network; of arrays also one such pair per channel.

    Applies to arrays, and to grey image files of more than 8 bits. None: 0..255 for arrays of 8 bits; the full range of
    a 16-bit file, 0..65535. Arrays of other types, and files of 32 bits and of floating-point numbers, have no default
    range and need this option."""
    cond_range: ValueRanges | None = None
    """value_range of the conditioning images."""
    outside_range: OutsideRange = "fail"
    """What happens to values of arrays outside their range: `fail` counts and refuses them, `clip` moves them to the
    nearest end of the range. In image files the range is a window: values outside are black or white."""

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
    def _check_ranges(self) -> Self:
        for name, ranges in (("value_range", self.value_range), ("cond_range", self.cond_range)):
            if ranges is not None:
                check_ranges(name, ranges)
        return self

    @property
    def single_range(self) -> ValueRange | None:
        """The range of all channels, of data that cannot have one per channel; None: not set."""
        return cast("ValueRange | None", self.value_range)

    @property
    def range_text(self) -> str:
        """The range as text: 0..255, or 0..1, -10..40."""
        ranges = self.value_range or (0.0, 255.0)
        pairs = ranges if isinstance(ranges[0], tuple) else (ranges,)
        return ", ".join("{:g}..{:g}".format(*pair) for pair in pairs)

    def for_conditions(self) -> DataConfig:
        """Return how the conditioning images are read."""
        mine = {"value_range": self.cond_range, "image_column": self.cond_column, "cond_range": None}
        return ConditionConfig.model_validate({**self.model_dump(), **mine})


class ConditionConfig(DataConfig):
    """How conditioning images are read: as images, with a range of their own."""

    title: ClassVar[str] = "conditioning images"
    range_field: ClassVar[str] = "data.cond_range"
    channels_field: ClassVar[str] = "model.cond_channels"
    column_field: ClassVar[str] = "data.cond_column"
    array: ClassVar[str] = "cond"
    counterpart: ClassVar[str] = "image"
