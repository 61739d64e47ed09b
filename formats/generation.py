"""Generation: everything that determines a folder of generated images, as its `manifest.json` holds it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from diffusion.config import FrozenConfig
from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED
from diffusion.quoting import quoted

IntArray = npt.NDArray[np.int64]
GenerationFormat = Literal["png", "webdataset", "parquet", "npz"]
MAX_SHARD_SIZE = 100_000
"""Most images of a shard; a few shards are held in memory."""

DESCRIPTIVE = frozenset({"complete", "iddpm", "model", "backend", "upsampling.model"})
"""Fields on which no image depends: a folder can be continued with other values."""


class Sampling(FrozenConfig):
    """How chains are computed, with the defaults filled in."""

    sampler: str
    respacing: str
    """Number of steps, or a respacing."""
    num_steps: int
    """Steps of the chain."""
    eta: float
    cfg_scale: float
    classifier_scale: float


class Upsampling(FrozenConfig):
    """The second model of a cascade, and how its chains are computed."""

    model: str
    model_sha256: str
    sampling: Sampling


class Generation(FrozenConfig):
    """A set of images, numbered 0 .. count - 1, and the files that hold them.

    Image k has the pixels that the service returns for `seed`, the image index `image_index` + k and the class of
    `class_of`, while its numerics_id is the same.
    """

    format_version: Literal[1] = 1
    kind: Literal["generated images"] = "generated images"
    complete: bool = False
    """Whether all files are written."""
    iddpm: str
    """Version of the package that began the folder."""
    model: str
    """Name of the model or cascade."""
    model_sha256: str
    """See `formats.model_hash`; of a cascade, that of its base."""
    numerics_id: str
    """Identity of the numerics: equal ids give equal pixels."""
    backend: str
    """Backend, device and precision, for human readers; part of the numerics_id."""
    sampling: Sampling
    upsampling: Upsampling | None = None
    """Of a cascade: its second stage; `sampling` is that of its base."""
    seed: int = Field(ge=0, le=MAX_SEED)
    image_index: int = Field(ge=0, le=MAX_IMAGE_INDEX)
    """Image index of the first image."""
    count: int = Field(ge=1, le=MAX_IMAGE_INDEX + 1)
    image_shape: tuple[int, int, int]
    """Height, width, channels; uint8."""
    classes: Annotated[tuple[int, ...], Field(min_length=1)] | None
    """Classes of the images by image index, repeated as often as needed; None: the images have no class."""
    class_names: tuple[str, ...]
    """Names of all classes of the model, by index; empty if it has none."""
    conditions: dict[str, str | int] | None = None
    """The data whose images condition the generated ones (`iddpm evaluate samples`); None: the model takes no
    conditioning image."""
    format: GenerationFormat
    shard_size: int = Field(ge=1, le=MAX_SHARD_SIZE)

    def index_of(self, k: int) -> int:
        """Return the image index of image k."""
        return self.image_index + k

    def class_of(self, k: int) -> int | None:
        """Return the class of image k; None without classes."""
        return None if self.classes is None else self.classes[self.index_of(k) % len(self.classes)]

    def labels(self, images: range) -> IntArray | None:
        """Return the classes of some images, int64 [n]; None without classes."""
        if self.classes is None:
            return None
        cycle = np.array(self.classes, np.int64)
        return cycle[(self.image_index + np.arange(images.start, images.stop)) % len(cycle)]

    def name_of(self, k: int) -> str:
        """Return the name of image k's file without suffix: SEED_INDEX, as `iddpm sample` names files."""
        return f"{self.seed}_{self.index_of(k)}"

    def shards(self) -> list[range]:
        """Return the images of each shard."""
        starts = range(0, self.count, self.shard_size)
        return [range(start, min(start + self.shard_size, self.count)) for start in starts]

    def differences(self, earlier: Generation) -> list[str]:
        """Return a text for each field on which images or files depend, and which was different earlier.

        Guidance scales are compared as float32, in which the network's output is scaled: earlier versions wrote a given
        scale as such.
        """
        now, then = _flat(self.model_dump(mode="json")), _flat(earlier.model_dump(mode="json"))
        return [
            f"{name} was {quoted(then.get(name))}, is {quoted(now.get(name))}"
            for name in {**then, **now}
            if name not in DESCRIPTIVE and not _is_same(name, then.get(name), now.get(name))
        ]


def generation_json(generation: Generation) -> str:
    """Return the text of a `manifest.json`: one line per field, however long its lists."""
    fields = generation.model_dump(mode="json").items()
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields) + "\n}\n"


def _is_same(name: str, then: Any, now: Any) -> bool:
    if name.endswith("_scale") and None not in (then, now):
        return bool(np.float32(then) == np.float32(now))
    return bool(then == now)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with those of nested objects as `outer.inner`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= (
            {f"{name}.{inner}": one for inner, one in _flat(value).items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat
