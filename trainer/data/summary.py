"""The line that summarises the data and their processing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diffusion.config import ImageSize, size_pair
from diffusion.quoting import printable
from trainer.data.dataset import IntArray
from trainer.data.image_file import Trait
from trainer.data.listing import describe_counts, shorten
from trainer.data.options import DataConfig

CLASSES_SHOWN = 20


@dataclass
class Summary:
    """Counts of the data found."""

    image_size: ImageSize
    """Image size of the model."""
    options: DataConfig
    images: int = 0
    smallest: tuple[int, int] | None = None
    """Width and height of the image with the fewest pixels, and of the one with the most."""
    largest: tuple[int, int] | None = None
    smaller: int = 0
    """Images with a side that is smaller than the model's."""
    reshaped: int = 0
    """Images that are scaled down, cropped, or both."""
    traits: Counter[Trait] = field(default_factory=Counter)
    classes: dict[str, int] | None = None
    """Images per class, in the order of labels; None: the labels are not used."""
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def add(self, width: int, height: int, traits: tuple[Trait, ...] = (), count: int = 1) -> None:
        """Count images of one size."""
        self.images += count
        size = (width, height)
        if self.smallest is None or width * height < self.smallest[0] * self.smallest[1]:
            self.smallest = size
        if self.largest is None or width * height > self.largest[0] * self.largest[1]:
            self.largest = size
        wanted_height, wanted_width = size_pair(self.image_size)
        if width < wanted_width or height < wanted_height:
            self.smaller += count
        elif size != (wanted_width, wanted_height):
            self.reshaped += count
        for trait in traits:
            self.traits[trait] += count

    def count_classes(self, names: Sequence[str], labels: IntArray) -> None:
        """Count the images of each class."""
        self.classes = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))

    def line(self) -> str:
        """Return the line."""
        images = "1 image" if self.images == 1 else f"{self.images:,} images"
        parts = [f"{images} {self._sizes()}", *self._classes(), *self._treatment()]
        if self.left_out:
            parts.append(f"skipped: {describe_counts(self.left_out)}")
        return f"{self.options.title}: " + "; ".join([*parts, *self._numbers_that_mislead(), *self.remarks])

    def _sizes(self) -> str:
        if self.smallest is None or self.largest is None:
            return ""
        sizes = dict.fromkeys(f"{width}x{height}" for width, height in (self.smallest, self.largest))
        return " to ".join(sizes)

    def _classes(self) -> list[str]:
        if self.classes is None:
            return ["no classes"] if self.options.title == DataConfig.title else []
        counts = list(self.classes.values())
        plural = "class" if len(counts) == 1 else "classes"
        if len(counts) <= CLASSES_SHOWN:
            listed = ", ".join(f"{printable(name)} ({count:,})" for name, count in self.classes.items())
            text = f"{len(counts)} {plural}: {listed}"
        else:
            text = f"{len(counts):,} classes of {min(counts):,} to {max(counts):,} images"
        if unused := [repr(name) for name, count in self.classes.items() if count == 0]:
            text += f" ({len(unused)} without an image: {shorten(unused)})"
        return [text]

    def _treatment(self) -> list[str]:
        height, width = size_pair(self.image_size)
        size = f"{width}x{height}"
        done = "framed in black" if self.options.small_images == "frame" else "enlarged"
        phrases = {
            f"smaller than the model's {size}, {done} (data.small_images)": self.smaller,
            f"scaled and cropped to {size}": self.reshaped,
            f"colour read as grey (--set {self.options.channels_field}=3 keeps it)": self.traits["colour"],
            "grey read as RGB": self.traits["grey"],
            "CMYK read without a colour profile": self.traits["cmyk"],
            f"with transparency, drawn over {self.options.background} (data.background)": self.traits["transparent"],
            f"of more than 8 bits, {self._range()} scaled to 0..255": self.traits["deep"],
            "rotated according to EXIF": self.traits["rotated"],
            "with several frames or pages, of which the first is used": self.traits["frames"],
        }
        return [f"{count:,} {phrase}" for phrase, count in phrases.items() if count]

    def _range(self) -> str:
        return "full range" if self.options.value_range is None else self.options.range_text

    def _numbers_that_mislead(self) -> list[str]:
        names = list(self.classes or ())
        if all(name.isascii() and name.isdigit() for name in names):
            for index, name in enumerate(names):
                if int(name) != index:
                    return [f"note that class names are not indices: index {index} is class {name!r}"]
        return []
