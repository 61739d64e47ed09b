"""Which images many images of one seed are: their manifest, from options, and the requests that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cli.split_requests import with_class_index

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cli.local_engine import LocalEngine
    from formats.generation import Generation, GenerationFormat, Sampling, Upsampling
    from service.engine.request import GenerationRequest, ImageParams


class Conditions(Protocol):
    """The conditioning images of a generation."""

    description: dict[str, str | int]
    """The data that they come from, with everything on which they depend."""

    def of(self, images: range) -> npt.NDArray[np.float32]:
        """Return those of some images as the network takes them, [n, C', H, W].

        Raises:
            ValueError: a file cannot be read.
        """
        ...


class Files(NamedTuple):
    """How images are stored."""

    format: GenerationFormat
    shard_size: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """The images that a command asks for, as its options say it."""

    sampling: dict[str, Any]
    """Fields of a request that say how a chain is computed; absent ones have the model's defaults."""
    num: int | None
    """Number of images; either this or `per_class`."""
    per_class: int | None
    """Images of each class."""
    classes: Sequence[str] | None
    """Names or indices of the classes; None: all."""
    seed: int
    image_index: int
    """Of the first image."""
    files: Files

    def __post_init__(self) -> None:
        if (self.num is None) == (self.per_class is None):
            raise ValueError("give either --num or --per-class")


def describe_order(engine: LocalEngine, order: Order) -> Generation:
    """Return the manifest of ordered images.

    Raises:
        ValidationError, InvalidRequest, ValueError: an option breaks a rule, or one of the model.
    """
    chosen = choose_classes(engine, order.sampling, order.classes)
    if order.per_class is not None and chosen is None:
        raise ValueError("--per-class needs a model with classes; use --num")
    return describe_generation(
        engine,
        order.sampling,
        seed=order.seed,
        image_index=order.image_index,
        count=order.num or (order.per_class or 0) * len(chosen or ()),
        classes=chosen,
        files=order.files,
    )


def describe_generation(
    engine: LocalEngine,
    sampling: dict[str, Any],
    *,
    seed: int,
    image_index: int,
    count: int,
    classes: Sequence[int] | None,
    files: Files,
    conditions: Conditions | None = None,
) -> Generation:
    """Return the manifest of images, with everything that determines them.

    Args:
        engine: the model.
        sampling: fields of a request that say how chains are computed; absent ones have the defaults of the models.
        seed: of all images.
        image_index: of the first image.
        count: number of images.
        classes: classes of the images by image index, repeated as often as needed; None: the images have none.
        files: how they are stored.
        conditions: the conditioning images, for a model that takes some.

    Raises:
        ValidationError, InvalidRequest: a field breaks a rule of requests, or of the model.
        ValueError: an image index is too large.
    """
    from importlib.metadata import version

    from diffusion.config import size_pair
    from diffusion.noise import MAX_IMAGE_INDEX
    from formats.generation import Generation, Upsampling
    from formats.model_hash import model_sha256

    if image_index + count - 1 > MAX_IMAGE_INDEX:
        raise ValueError(f"--image-index must be at most {MAX_IMAGE_INDEX - count + 1} with {count} images")
    one = {} if classes is None else {"class": classes[0]}
    fields = {**sampling, **one, "seed": seed, "image_index": image_index, "n": 1}
    request = engine.complete(fields, cond=None if conditions is None else conditions.of(range(1)))
    of_stages = [_sampling(images[0]) for images in request.stages]
    hashes = [(model.name, model_sha256(folder)) for model, folder in engine.stages]
    result = engine.result_config.model
    height, width = size_pair(result.image_size)
    return Generation(
        iddpm=version("iddpm"),
        model=engine.name,
        model_sha256=hashes[0][1],
        numerics_id=engine.numerics_id,
        backend=engine.backend,
        sampling=of_stages[0],
        upsampling=None
        if request.then is None
        else Upsampling(model=hashes[1][0], model_sha256=hashes[1][1], sampling=of_stages[1]),
        seed=seed,
        image_index=image_index,
        count=count,
        image_shape=(height, width, result.image_channels),
        classes=None if classes is None else tuple(classes),
        class_names=engine.class_names,
        conditions=None if conditions is None else conditions.description,
        format=files.format,
        shard_size=files.shard_size,
    )


def _sampling(image: ImageParams) -> Sampling:
    from formats.generation import Sampling

    return Sampling(
        sampler=image.plan.sampler,
        respacing=image.plan.spec,
        num_steps=image.num_steps,
        eta=image.plan.eta,
        cfg_scale=_shortest(image.cfg_scale),
        classifier_scale=_shortest(image.classifier_scale),
    )


def _shortest(scale: float) -> float:
    """Return the number with the fewest digits that is this one in float32: 1.3 for 1.2999999523162842."""
    import numpy as np

    return float(str(np.float32(scale)))


def choose_classes(engine: LocalEngine, sampling: dict[str, Any], names: Sequence[str] | None) -> list[int] | None:
    """Return the indices of the classes of images to generate; None if images have no class.

    Args:
        engine: the model.
        sampling: fields of a request; classifier guidance gives classes to a model without.
        names: names or indices; None: all classes.

    Raises:
        ValidationError, InvalidRequest: there is no such class, or another field breaks a rule.
        ValueError: a class is named twice.
    """
    if names is None:
        (image,) = engine.complete(sampling).images
        return None if image.class_index is None else list(range(len(engine.class_names)))
    found = []
    for name in names:
        (image,) = engine.complete(with_class_index({**sampling, "class": name}, lambda: engine.class_names)).images
        assert image.class_index is not None  # noqa: S101  # else `complete` refuses a class
        found.append(image.class_index)
    if len(set(found)) < len(found):
        raise ValueError(f"--class: each class can be given once; got {', '.join(names)}")
    return found


def requests_for(
    engine: LocalEngine, generation: Generation, images: range, conditions: Conditions | None = None
) -> list[GenerationRequest]:
    """Return the requests for some images of a generation: what a client would send for their seed, index, class and
    conditioning image.

    Raises:
        ValidationError, InvalidRequest: a field breaks a rule.
        ValueError: a conditioning image cannot be read.
    """
    labels = generation.labels(images)
    return requests_from(
        engine,
        generation.sampling,
        generation.upsampling,
        seed=generation.seed,
        image_index=generation.index_of(images.start),
        count=len(images),
        labels=None if labels is None else labels.tolist(),
        cond=None if conditions is None else conditions.of(images),
    )


def requests_from(
    engine: LocalEngine,
    sampling: Sampling,
    upsampling: Upsampling | None,
    *,
    seed: int,
    image_index: int,
    count: int,
    labels: list[int] | None,
    cond: npt.NDArray[np.float32] | None = None,
) -> list[GenerationRequest]:
    """Return the requests for images of consecutive indices.

    Args:
        engine: the model or cascade.
        sampling: how a chain is computed.
        upsampling: of a cascade: how its second model's chains are computed.
        seed: of all images.
        image_index: of the first image.
        count: number of images.
        labels: the class of each image; None: the images have none.
        cond: the conditioning image of each image as the network takes it, [count, C', H, W]; None: they have none.

    Raises:
        ValidationError, InvalidRequest: a field breaks a rule.
    """
    from service.requests.generate_request import MAX_IMAGES

    fields: dict[str, Any] = {
        "sampler": sampling.sampler,
        "respacing": sampling.respacing,
        "cfg_scale": sampling.cfg_scale,
        "classifier_scale": sampling.classifier_scale,
        "seed": seed,
    }
    if sampling.eta:
        fields["eta"] = sampling.eta
    if upsampling is not None:
        later = upsampling.sampling
        fields["upsample"] = {
            "steps": int(later.respacing),
            "sampler": later.sampler,
            "cfg_scale": later.cfg_scale,
            "classifier_scale": later.classifier_scale,
        }
    found = []
    for first in range(0, count, MAX_IMAGES):
        part = slice(first, min(first + MAX_IMAGES, count))
        one = {} if labels is None else {"class": labels[part]}
        request = engine.complete(
            {**fields, **one, "image_index": image_index + first, "n": part.stop - first},
            cond=None if cond is None else cond[part],
        )
        found.append(request)
    return found
