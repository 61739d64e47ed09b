"""The frozen configurations that a checkpoint's `config.json` holds.

Every class rejects unknown names, and its errors name the field and the rule: a typo in a `config.json` raises an
error instead of building a network that samples noise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    PositiveInt,
    Tag,
    model_validator,
)

NoiseSchedule = Literal["linear", "cosine"]
Variance = Literal["learned_range", "learned", "fixed_small", "fixed_large"]
Prediction = Literal["eps", "x0"]
AttentionOrder = Literal["legacy", "new"]
ClassifierPool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
ValueRange = tuple[FiniteFloat, FiniteFloat]
"""The values of the data that are -1 and 1 for the network."""
ValueRanges = ValueRange | tuple[ValueRange, ...]
"""One range for all channels, or one per channel."""

MAX_CHANNELS = 32


def ranges_of(ranges: ValueRanges, channels: int) -> tuple[ValueRange, ...]:
    """Return the range of each channel: the given ones, or the only one for all of `channels`."""
    if ranges and isinstance(ranges[0], tuple):
        return ranges
    return (cast("ValueRange", ranges),) * channels


def check_ranges(field: str, ranges: ValueRanges, channels: int | None = None) -> None:
    """Check value ranges: one, or one per channel.

    Args:
        field: name of the field.
        ranges: its value.
        channels: the number of channels; None: any number of ranges is accepted.

    Raises:
        ValueError: there is another number of ranges, or one is not [low, high] with low < high.
    """
    found = ranges_of(ranges, 1 if channels is None else channels)
    if not ranges or (channels is not None and len(found) != channels):
        wanted = "" if channels is None else f" ({channels})"
        raise ValueError(f"{field} must be [low, high], or one such pair per channel{wanted}; got {len(ranges)} pairs")
    for low, high in found:
        if not low < high:
            raise ValueError(f"{field} must be [low, high] with low < high; got {[low, high]}")


def size_pair(size: ImageSize) -> tuple[int, int]:
    """Return height and width of a size in pixels."""
    return size if isinstance(size, tuple) else (size, size)


def size_text(size: ImageSize) -> str:
    """Return a size as text: 64x64, or height x width."""
    height, width = size_pair(size)
    return f"{height}x{width}"


def _side_if_square(size: int | tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


ImageSize = Annotated[
    Annotated[PositiveInt, Tag("side")] | Annotated[tuple[PositiveInt, PositiveInt], Tag("pair")],
    Discriminator(lambda size: "pair" if isinstance(size, list | tuple) else "side"),
    AfterValidator(_side_if_square),
]
"""A size in pixels: the side of a square, or (height, width); a pair of equal numbers becomes one number."""


class FrozenConfig(BaseModel):
    """An immutable configuration that rejects unknown names; `replace` validates again, `model_copy` does not."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})


class BackboneConfig(FrozenConfig):
    """The fields that the UNet and the noisy classifier share: levels, residual blocks and attention."""

    image_size: ImageSize
    """Size of the images in pixels: the side of square images, or [height, width]."""
    image_channels: int = Field(default=3, ge=1, le=MAX_CHANNELS)
    """Channels of the images: 3 for RGB, 1 for grey."""
    model_channels: int = Field(ge=1)
    """Width C of the first level; level i has int(channel_mult[i] * C) channels."""
    channel_mult: tuple[float, ...] = Field(min_length=1)
    """Width of each level as a multiple of model_channels; one level per entry, each half the size."""
    num_res_blocks: int = Field(default=2, ge=1)
    """Residual blocks per level of the encoder; the UNet's decoder has one more."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Feature-map heights in pixels at which self-attention follows the residual blocks.

    They name levels by their downsampling factor, image height / value, as in OpenAI's code. For square images, the
    height is the size."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads; ignored if num_head_channels is set."""
    num_head_channels: int | None = Field(default=None, ge=1)
    """Channels per attention head; None: use num_heads."""
    attention_order: AttentionOrder = "legacy"
    """Channel layout of the attention's qkv: legacy = [head][q|k|v], new = [q|k|v][head]."""
    use_scale_shift_norm: bool = True
    """Condition by GroupNorm(h)(1 + w) + b (paper, appendix A) instead of GroupNorm(h + e)."""
    resblock_updown: bool = False
    """Resample inside residual blocks (ADM) instead of by separate layers."""
    conv_resample: bool = True
    """Resample with convolutions; False: average pooling and nearest neighbour."""
    norm_groups: int = Field(default=32, ge=1)
    """Groups of every GroupNorm; must divide the channels of each level. OpenAI's networks have 32.

    With as many groups as channels it is an instance norm, which removes the image's grey level.
    """
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability inside residual blocks during training."""

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, largest feature map first."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Feature-map height in pixels of each level."""
        return tuple(self.image_height >> level for level in range(len(self.channel_mult)))

    @property
    def image_height(self) -> int:
        """Height of the images in pixels."""
        return size_pair(self.image_size)[0]

    @property
    def image_width(self) -> int:
        """Width of the images in pixels."""
        return size_pair(self.image_size)[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return self.image_channels, self.image_height, self.image_width

    @property
    def emb_channels(self) -> int:
        """Width of the time embedding after its MLP."""
        return 4 * self.model_channels

    def heads_for(self, channels: int, num_heads: int | None = None) -> int:
        """Return the number of attention heads at a level with `channels` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        return num_heads or self.num_heads

    @model_validator(mode="after")
    def _check_backbone(self) -> Self:
        halvings = len(self.channel_mult) - 1
        if self.image_height % (1 << halvings) or self.image_width % (1 << halvings):
            raise ValueError(
                f"image_size must be a multiple of {1 << halvings}: channel_mult has {halvings + 1} levels, "
                f"each half the size; got {_named(self.image_size)}"
            )
        for mult, channels in zip(self.channel_mult, self.level_channels, strict=True):
            if channels == 0 or channels % self.norm_groups:
                raise ValueError(
                    f"channel_mult x model_channels must be a multiple of norm_groups ({self.norm_groups}); "
                    f"{mult:g} x {self.model_channels} is {channels}"
                )
        for size in self.attention_resolutions:
            if size not in self.level_sizes:
                raise ValueError(
                    f"attention_resolutions must name {'sizes' if isinstance(self.image_size, int) else 'heights'} of "
                    f"levels, which are {list(self.level_sizes)}; got {size}"
                )
        attended = {
            c for c, s in zip(self.level_channels, self.level_sizes, strict=True) if s in self.attention_resolutions
        }
        for channels in {*attended, self.level_channels[-1]}:
            self._check_heads(channels)
        return self

    def _check_heads(self, channels: int) -> None:
        name, value = "num_heads", self.num_heads
        if self.num_head_channels is not None:
            name, value = "num_head_channels", self.num_head_channels
        if channels % value:
            raise ValueError(f"{name} must divide the {channels} channels of an attention layer; got {value}")


class ModelConfig(BackboneConfig):
    """The UNet of IDDPM (arXiv:2102.09672) and ADM (arXiv:2105.05233), super-resolution included."""

    num_heads_upsample: int | None = Field(default=None, ge=1)
    """Attention heads in the decoder; None: num_heads."""
    num_classes: int | None = Field(default=None, ge=1)
    """Classes that the network is conditioned on; None: unconditional."""
    null_class: bool = False
    """Whether label index num_classes stands for "no label", which classifier-free guidance needs."""
    learn_sigma: bool = True
    """Whether the network also outputs var_values (twice the image channels)."""
    low_res_size: ImageSize | None = None
    """Super-resolution: size of the low-resolution image that the network is conditioned on; None: no such image.

    Like image_size. The image is enlarged bilinearly before it is concatenated to x_t (`diffusion.conditioning`)."""
    cond_channels: int = Field(default=0, ge=0, le=MAX_CHANNELS)
    """Channels of an image of image_size that is concatenated to x_t; 0: none. Excludes low_res_size."""

    @property
    def low_res_shape(self) -> tuple[int, int, int] | None:
        """Shape (C, h, w) of a super-resolution model's low-resolution input; None for other models."""
        return None if self.low_res_size is None else (self.image_channels, *size_pair(self.low_res_size))

    @property
    def cond_shape(self) -> tuple[int, int, int] | None:
        """Shape (C', H, W) of the conditioning image that the network gets beside x_t; None: it gets none."""
        channels = self.cond_channels if self.low_res_size is None else self.image_channels
        return (channels, self.image_height, self.image_width) if channels else None

    @property
    def in_channels(self) -> int:
        """Channels of the network's input: x_t, and the conditioning image."""
        return self.image_channels + (0 if self.cond_shape is None else self.cond_shape[0])

    @property
    def out_channels(self) -> int:
        """Channels of the output: eps (or x0), and var_values if the variance is learned."""
        return self.image_channels * (2 if self.learn_sigma else 1)

    @property
    def num_labels(self) -> int:
        """Rows of the label embedding; 0 for an unconditional model."""
        return 0 if self.num_classes is None else self.num_classes + int(self.null_class)

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class needs num_classes: an unconditional model has no labels")
        if self.low_res_shape is not None and (
            self.low_res_shape[1] > self.image_height or self.low_res_shape[2] > self.image_width
        ):
            raise ValueError(
                f"low_res_size must be at most image_size ({_named(self.image_size)}); got {_named(self.low_res_size)}"
            )
        if self.low_res_size is not None and self.cond_channels:
            raise ValueError(
                f"cond_channels must be 0 with low_res_size, whose image has image_channels; got {self.cond_channels}"
            )
        return self


class ClassifierConfig(BackboneConfig):
    """The noisy classifier of ADM (arXiv:2105.05233, section 4): the UNet's encoder and a pooling head."""

    num_classes: int = Field(ge=2)
    """Logits the classifier returns."""
    pool: ClassifierPool = "attention"
    """Head that turns features into logits."""

    @property
    def num_labels(self) -> int:
        """Number of labels: the classifier has no null class."""
        return self.num_classes

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.pool == "attention" and self.num_head_channels is None:
            raise ValueError("num_head_channels is required by pool 'attention': it is the width of its heads")
        return self


def _named(size: ImageSize | None) -> object:
    return list(size) if isinstance(size, tuple) else size


class DiffusionConfig(FrozenConfig):
    """The diffusion process that a network was trained for."""

    num_timesteps: int = Field(default=4000, ge=2)
    """T, the number of timesteps of the training chain; above 20 with a linear schedule."""
    noise_schedule: NoiseSchedule = "cosine"
    """Schedule of the betas: linear (Ho et al. 2020) or cosine (IDDPM, Equation 17)."""
    variance: Variance = "learned_range"
    """Variance of the reverse process; learned_range is IDDPM's Equation 15."""
    prediction: Prediction = "eps"
    """What the first image_channels channels of the output predict."""
    rescale_timesteps: bool = False
    """Whether the network's timestep input is t * 1000 / T instead of t."""

    @property
    def learns_variance(self) -> bool:
        """Whether the network must output var_values."""
        return self.variance in ("learned", "learned_range")

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.noise_schedule == "linear" and self.num_timesteps <= 20:
            raise ValueError(
                "num_timesteps must be above 20 for noise_schedule 'linear', whose last beta is 20 / num_timesteps and "
                f"must be below 1; got {self.num_timesteps}"
            )
        return self


class SamplingDefaults(FrozenConfig):
    """Sampling parameters that a model's authors recommend; a request may override them."""

    cfg_scale: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Classifier-free guidance scale; 1 = off."""


class CheckpointConfig(FrozenConfig):
    """The `config.json` of a UNet's checkpoint folder: everything needed to rebuild and sample the network."""

    format_version: Literal[1] = 1
    kind: Literal["unet"] = "unet"
    model: ModelConfig
    diffusion: DiffusionConfig
    class_names: tuple[str, ...] | None = None
    """One name per class, in label order; None: the classes have no names."""
    value_range: ValueRanges = (0.0, 255.0)
    """[low, high]: the values of the data that are -1 and 1 for the network, or one such pair per image channel.

    The units of float32 arrays (`formats.value_range`). Eight-bit pixels do not depend on it: 0 is low, 255 is high."""
    cond_range: ValueRanges = (-1.0, 1.0)
    """The same of conditioning images (`model.cond_channels`): by default float32 arrays reach the network as they are.

    An upsampler's low-resolution images have the value_range of the data instead."""
    sampling: SamplingDefaults = SamplingDefaults()
    provenance: dict[str, Any] = {}
    """Where the weights come from: command, commit, images seen, or the imported file. For human readers."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.model.learn_sigma != self.diffusion.learns_variance:
            raise ValueError(
                f"model.learn_sigma must be {self.diffusion.learns_variance} for diffusion.variance "
                f"'{self.diffusion.variance}'; got {self.model.learn_sigma}"
            )
        if self.class_names is not None and len(self.class_names) != (self.model.num_classes or 0):
            raise ValueError(
                f"class_names must have one name per class: model.num_classes is {self.model.num_classes}, "
                f"got {len(self.class_names)} names"
            )
        check_ranges("value_range", self.value_range, self.model.image_channels)
        if self.model.cond_channels:
            check_ranges("cond_range", self.cond_range, self.model.cond_channels)
        elif self.cond_range != (-1.0, 1.0):
            raise ValueError(f"cond_range needs model.cond_channels; got {self.cond_range}")
        if self.sampling.cfg_scale != 1.0 and not self.model.null_class:
            raise ValueError("sampling.cfg_scale other than 1 needs model.null_class")
        return self

    @property
    def channel_ranges(self) -> tuple[ValueRange, ...]:
        """[low, high] of each image channel."""
        return ranges_of(self.value_range, self.model.image_channels)

    @property
    def cond_channel_ranges(self) -> tuple[ValueRange, ...]:
        """[low, high] of each channel of the conditioning image; empty for a model without `cond_channels`."""
        return ranges_of(self.cond_range, self.model.cond_channels)


class ClassifierCheckpointConfig(FrozenConfig):
    """The `config.json` of a noisy classifier's folder."""

    format_version: Literal[1] = 1
    kind: Literal["classifier"] = "classifier"
    model: ClassifierConfig
    diffusion: DiffusionConfig
    """The noising process that the classifier was trained on; only its schedule, length and rescaling matter."""
    class_names: tuple[str, ...] | None = None
    provenance: dict[str, Any] = {}
