"""Convert the two configuration files of a diffusers UNet2DModel and its scheduler to and from our configurations.

diffusers is not imported outside the tests: its files are JSON and safetensors. The mapping follows the source of
version 0.42.1, and tests/parity/test_diffusers.py compares it with the library. A configuration that the other side
cannot express is rejected with all reasons at once; docs/diffusers.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt

from diffusion.config import DiffusionConfig, FrozenConfig, ModelConfig, Prediction, Variance, size_pair
from diffusion.respacing import respace

DIFFUSERS_VERSION = "0.42.1"
"""The version that this file describes; written into exported files as the library's version."""

NORM_EPS = 1e-5
"""Epsilon of every normalisation in the IDDPM/ADM networks."""

MODEL_TIMESTEPS = 1000
"""Upper end of rescaled timesteps: the input of a network with `rescale_timesteps` is t * 1000 / T."""

BETA_TOLERANCE = 1e-6
"""Allowed relative difference of beta_start and beta_end, for decimal numbers written by hand."""


class DoesNotMap(ValueError):
    """The other side cannot express a configuration; the message has one line per field, with the reason."""


class UNet2DConfig(FrozenConfig):
    """`config.json` of a UNet2DModel, with the library's defaults for absent fields."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[PositiveInt, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str | None = "conv"
    upsample_type: str | None = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    """Used by learned time embeddings only."""


class SchedulerConfig(FrozenConfig):
    """`scheduler_config.json` of a DDPMScheduler or a DDIMScheduler: the process, and sampling options."""

    num_train_timesteps: PositiveInt = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    """DDPMScheduler only."""
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    """DDIMScheduler only."""


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SCHEDULER_FILE = "scheduler_config.json"
INDEX_FILE = "model_index.json"
"""Index of a pipeline: the class of each of its parts."""
OURS_FILE = "iddpm.json"
"""The checkpoint's configuration, added by `iddpm export`: it holds what the library's files cannot express."""

UNET_CLASS = "UNet2DModel"
SCHEDULER_CLASSES = ("DDPMScheduler", "DDIMScheduler")

_OF_EMA = ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
"""Fields that the library's EMA adds to the configuration of the averaged network."""

_IGNORED = frozenset({*_OF_EMA, "tensor_format"})
"""Fields that do not describe a network or a process; the last was used by the first versions."""

_UNET_RULES: dict[str, tuple[tuple[Any, ...], str]] = {
    "center_input_sample": ((False,), "the network takes images in [-1, 1] as they are"),
    "time_embedding_type": (("positional",), "the time embedding is sinusoidal"),
    "freq_shift": ((0,), "the frequencies of the time embedding are exp(-ln(10000) i / half), not / (half - 1)"),
    "mid_block_type": (("UNetMidBlock2D",), "the middle is residual block, attention, residual block"),
    "mid_block_scale_factor": ((1,), "residual sums are not scaled"),
    "act_fn": (("silu", "swish"), "every activation is SiLU"),
    "norm_eps": ((NORM_EPS,), "the epsilon of every normalisation is fixed"),
    "add_attention": ((True,), "the middle always attends"),
    "class_embed_type": ((None,), "classes are a table of embeddings, num_class_embeds rows"),
    "resnet_time_scale_shift": (("default", "scale_shift"), "the embedding is added, or scales and shifts"),
}
"""Supported values of UNet2DModel's fields, and the reason: the corresponding property of our network."""

_VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same standard deviation, computed through its logarithm
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0"}


def parse_unet(content: Mapping[str, Any]) -> UNet2DConfig:
    """Parse the content of a UNet2DModel's `config.json`.

    Raises:
        DoesNotMap: the configuration is of another class.
        ValidationError: a field is unknown or has another type.
    """
    return UNet2DConfig.model_validate(_fields(content, (UNET_CLASS,)))


def parse_scheduler(content: Mapping[str, Any]) -> SchedulerConfig:
    """Parse the content of a `scheduler_config.json`.

    Raises:
        DoesNotMap: the configuration is of another class.
        ValidationError: a field is unknown or has another type.
    """
    return SchedulerConfig.model_validate(_fields(content, SCHEDULER_CLASSES))


def _fields(content: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    if content.get("_class_name") not in classes:
        raise DoesNotMap(f"_class_name must be {' or '.join(classes)}; got {content.get('_class_name')!r}")
    return {
        name: value
        for name, value in content.items()
        # Ignore unknown fields that are null: files of old versions have some.
        if not name.startswith("_") and name not in _IGNORED and (value is not None or name in _KNOWN)
    }


_KNOWN = frozenset({**UNet2DConfig.model_fields, **SchedulerConfig.model_fields})


def unet_json(unet: UNet2DConfig) -> dict[str, Any]:
    """Return the content of a UNet2DModel's `config.json`."""
    return {"_class_name": UNET_CLASS, "_diffusers_version": DIFFUSERS_VERSION, **unet.model_dump(mode="json")}


def scheduler_json(scheduler: SchedulerConfig) -> dict[str, Any]:
    """Return the content of a DDPMScheduler's `scheduler_config.json`."""
    fields = scheduler.model_dump(mode="json", exclude={"set_alpha_to_one"})
    return {"_class_name": SCHEDULER_CLASSES[0], "_diffusers_version": DIFFUSERS_VERSION, **fields}


def to_unet_config(model: ModelConfig) -> UNet2DConfig:
    """Convert a network's configuration to a UNet2DModel's.

    Raises:
        DoesNotMap: UNet2DModel cannot express the network.
    """
    problems = []
    if model.low_res_size is not None:
        problems.append(
            f"low_res_size must be null: {UNET_CLASS} has no low-resolution input; got {model.low_res_size}"
        )
    if model.cond_channels:
        problems.append(f"cond_channels must be 0: {UNET_CLASS} has no conditioning image; got {model.cond_channels}")
    if model.level_channels[0] != model.model_channels:
        problems.append(
            f"channel_mult must begin with 1: {UNET_CLASS} embeds timesteps in the width of the first level, and "
            f"{model.level_channels[0]} channels have other frequencies than {model.model_channels}; "
            f"got {model.channel_mult[0]:g}"
        )
    widths = sorted(_head_widths(model))
    one_head = all(heads == 1 for _, heads in _attention_layers(model))
    if len(widths) > 1 and not one_head:
        problems.append(
            "num_heads, num_heads_upsample: attention_head_dim is one number for all levels, encoder and decoder; "
            f"got heads of {', '.join(map(str, widths))} channels"
        )
    _raise_if(problems, f"{UNET_CLASS} cannot express the network")

    attended = [size in model.attention_resolutions for size in model.level_sizes]
    resampling = "Resnet{}sampleBlock2D" if model.resblock_updown else "{}Block2D"
    down = tuple("AttnDownBlock2D" if attends else resampling.format("Down") for attends in attended)
    up = tuple("AttnUpBlock2D" if attends else resampling.format("Up") for attends in reversed(attended))
    return UNet2DConfig(
        sample_size=model.image_size,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=model.level_channels,
        layers_per_block=model.num_res_blocks,
        downsample_type="resnet" if model.resblock_updown else "conv",
        upsample_type="resnet" if model.resblock_updown else "conv",
        dropout=model.dropout,
        attention_head_dim=None if one_head else widths[0],
        norm_num_groups=model.norm_groups,
        # With null, the attention of the middle block has no normalisation under scale_shift.
        attn_norm_num_groups=model.norm_groups,
        resnet_time_scale_shift="scale_shift" if model.use_scale_shift_norm else "default",
        num_class_embeds=model.num_labels or None,
    )


def _attention_layers(model: ModelConfig) -> list[tuple[int, int]]:
    """Return channels and heads of attention: of each level of the encoder, the middle block, and the decoder."""
    attended = [
        channels
        for channels, size in zip(model.level_channels, model.level_sizes, strict=True)
        if size in model.attention_resolutions
    ]
    encoder = [(channels, model.heads_for(channels)) for channels in (*attended, model.level_channels[-1])]
    return encoder + [(channels, model.heads_for(channels, model.num_heads_upsample)) for channels in attended]


def _head_widths(model: ModelConfig) -> set[int]:
    return {channels // heads for channels, heads in _attention_layers(model)}


def to_model_config(unet: UNet2DConfig, null_class: bool = False) -> ModelConfig:
    """Convert a UNet2DModel's configuration to ours.

    Args:
        unet: its configuration.
        null_class: whether the last of its num_class_embeds stands for "no label"; the configuration has no field for
            this.

    Raises:
        DoesNotMap: our configuration cannot express the network.
        ValidationError: the converted configuration breaks a rule, for example channels that are not a multiple of
            norm_num_groups.
    """
    problems = [
        f"{name} must be {' or '.join(map(repr, allowed))}: {reason}; got {getattr(unet, name)!r}"
        for name, (allowed, reason) in _UNET_RULES.items()
        if getattr(unet, name) not in allowed
    ]
    problems += _unet_problems(unet)
    problems += _level_problems(unet)
    if null_class and (unet.num_class_embeds or 0) < 2:
        problems.append(f"num_class_embeds must be at least 2 with a null class; got {unet.num_class_embeds}")
    _raise_if(problems, f"the {UNET_CLASS} is not supported")

    assert unet.sample_size is not None  # noqa: S101  # checked above
    height, _ = size_pair(unet.sample_size)
    attended = [kind == "AttnDownBlock2D" for kind in _down_kinds(unet)]
    return ModelConfig(
        image_size=unet.sample_size,
        image_channels=unet.in_channels,
        model_channels=unet.block_out_channels[0],
        channel_mult=tuple(_multiple(width, unet.block_out_channels[0]) for width in unet.block_out_channels),
        num_res_blocks=unet.layers_per_block,
        attention_resolutions=tuple(height >> level for level, attends in enumerate(attended) if attends),
        num_heads=1,
        num_head_channels=unet.attention_head_dim,
        attention_order="new",
        use_scale_shift_norm=unet.resnet_time_scale_shift == "scale_shift",
        resblock_updown="resnet" in _resamplings(unet),
        norm_groups=unet.norm_num_groups,
        dropout=unet.dropout,
        num_classes=None if unet.num_class_embeds is None else unet.num_class_embeds - int(null_class),
        null_class=null_class,
        learn_sigma=unet.out_channels == 2 * unet.in_channels,
    )


def _unet_problems(unet: UNet2DConfig) -> list[str]:
    problems = []
    if unet.sample_size is None:
        problems.append("sample_size must be the size of the images in pixels, a number or [height, width]; got null")
    if unet.out_channels not in (unet.in_channels, 2 * unet.in_channels):
        problems.append(
            f"out_channels must be in_channels, or twice that if the variance is learned; got {unet.out_channels} "
            f"for {unet.in_channels} (networks with a conditioning image as input are not supported)"
        )
    width = unet.block_out_channels[0] if unet.block_out_channels else 0
    if unet.time_embedding_dim not in (None, 4 * width):
        problems.append(
            f"time_embedding_dim must be null or {4 * width}: it is four times the first level's width; "
            f"got {unet.time_embedding_dim}"
        )
    groups = unet.attn_norm_num_groups
    if groups is None and unet.resnet_time_scale_shift != "default":
        problems.append(
            f"attn_norm_num_groups must be {unet.norm_num_groups}: with null and resnet_time_scale_shift 'scale_shift' "
            "the attention of the middle block has no normalisation; got null"
        )
    elif groups not in (None, unet.norm_num_groups):
        problems.append(
            f"attn_norm_num_groups must be norm_num_groups ({unet.norm_num_groups}), which all normalisations share; "
            f"got {groups}"
        )
    return problems


def _level_problems(unet: UNet2DConfig) -> list[str]:
    down, up = _down_kinds(unet), _up_kinds(unet)
    if not 0 < len(unet.block_out_channels) == len(down) == len(up):
        return [
            "block_out_channels, down_block_types and up_block_types must have one entry per level; "
            f"got {len(unet.block_out_channels)}, {len(down)} and {len(up)}"
        ]
    known = {
        "down": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
    problems = [
        f"{side}_block_types must be among {', '.join(known[side])}; got {kind}"
        for side, kinds in (("down", down), ("up", up))
        for kind in dict.fromkeys(kinds)
        if kind not in known[side]
    ]
    if problems:
        return problems
    if [kind.startswith("Attn") for kind in down] != [kind.startswith("Attn") for kind in reversed(up)]:
        problems.append(
            "up_block_types must have attention at the same levels as down_block_types; "
            f"got {', '.join(down)} and {', '.join(up)}"
        )
    ways = _resamplings(unet)
    if len(ways) > 1 or not ways <= {"conv", "resnet"}:
        problems.append(
            "down_block_types, up_block_types, downsample_type, upsample_type: all levels must be resampled by "
            "convolutions (DownBlock2D, or AttnDownBlock2D with downsample_type 'conv'), or all by residual blocks "
            f"(ResnetDownsampleBlock2D, or 'resnet'); got {', '.join(sorted(ways))}"
        )
    elif "conv" in ways and unet.downsample_padding != 1:
        problems.append(
            "downsample_padding must be 1: 0 pads the right and lower edges only, which shifts the convolution's "
            f"input; got {unet.downsample_padding}"
        )
    return problems


def _down_kinds(unet: UNet2DConfig) -> list[str]:
    return [kind.removeprefix("UNetRes") for kind in unet.down_block_types]


def _up_kinds(unet: UNet2DConfig) -> list[str]:
    return [kind.removeprefix("UNetRes") for kind in unet.up_block_types]


def _resamplings(unet: UNet2DConfig) -> set[str]:
    """Return the kinds of resampling between levels; empty for a single level. The last block of a side has none."""
    attention = {"AttnDownBlock2D": unet.downsample_type or "conv", "AttnUpBlock2D": unet.upsample_type or "conv"}
    kinds = _down_kinds(unet)[:-1] + _up_kinds(unet)[:-1]
    return {attention.get(kind, "resnet" if kind.startswith("Resnet") else "conv") for kind in kinds}


def _multiple(channels: int, base: int) -> float:
    mult = channels / base
    return mult if int(mult * base) == channels else math.nextafter(mult, math.inf)  # ModelConfig rounds down


def to_scheduler_config(diffusion: DiffusionConfig) -> SchedulerConfig:
    """Convert a process to the configuration of a DDPMScheduler, whose steps equal our ancestral sampling.

    Its chains of N steps visit the timesteps of our respacing "N", except for some that differ by one: OpenAI's code
    accumulates strides, so the rounding of halves varies (N = 50, 100, 250 agree for T = 1000 and 4000).

    The library's timestep input is always t. A network with the input t * 1000 / T has the timesteps 0..999 of a
    process that keeps every T/1000th timestep; the configuration describes that process by its betas.

    Raises:
        DoesNotMap: a DDPMScheduler cannot express the process.
    """
    steps = diffusion.num_timesteps
    rescaled = diffusion.rescale_timesteps and steps != MODEL_TIMESTEPS
    problems = []
    if rescaled and steps % MODEL_TIMESTEPS:
        problems.append(
            f"rescale_timesteps: the library does not rescale timesteps, so num_timesteps must be a multiple of "
            f"{MODEL_TIMESTEPS}; got {steps}"
        )
    if diffusion.variance not in _VARIANCES.values():
        problems.append(
            f"variance must be one of {', '.join(dict.fromkeys(_VARIANCES.values()))}: in the library 'learned' is a "
            f"variance, here it is a log variance; got {diffusion.variance!r}"
        )
    _raise_if(problems, "a DDPMScheduler cannot express the process")

    betas = tuple(respace(diffusion, f"ddim{MODEL_TIMESTEPS}").schedule.betas.tolist()) if rescaled else None
    beta_start, beta_end = _linear_ends(steps)
    return SchedulerConfig(
        num_train_timesteps=MODEL_TIMESTEPS if rescaled else steps,
        # beta_start and beta_end are not used by the other schedules; the library writes its defaults there, too
        **({"beta_start": beta_start, "beta_end": beta_end} if diffusion.noise_schedule == "linear" else {}),
        beta_schedule="linear" if diffusion.noise_schedule == "linear" else "squaredcos_cap_v2",
        trained_betas=betas,
        variance_type=diffusion.variance,
        prediction_type={ours: theirs for theirs, ours in _PREDICTIONS.items()}[diffusion.prediction],
        timestep_spacing="linspace",  # keeps both ends, as respacing does
    )


def to_diffusion_config(scheduler: SchedulerConfig) -> DiffusionConfig:
    """Convert a scheduler's configuration to our process.

    Raises:
        DoesNotMap: our configuration cannot express the process.
    """
    problems = []
    if scheduler.trained_betas is not None:
        problems.append("trained_betas must be null: only named schedules are supported")
    elif scheduler.beta_schedule not in ("linear", "squaredcos_cap_v2"):
        problems.append(f"beta_schedule must be 'linear' or 'squaredcos_cap_v2'; got {scheduler.beta_schedule!r}")
    elif scheduler.beta_schedule == "linear":
        problems += [
            f"{name} must be {expected:g}: linear schedules go from 0.1 / T to 20 / T, T = num_train_timesteps = "
            f"{scheduler.num_train_timesteps}; got {value:g}"
            for name, expected, value in zip(
                ("beta_start", "beta_end"),
                _linear_ends(scheduler.num_train_timesteps),
                (scheduler.beta_start, scheduler.beta_end),
                strict=True,
            )
            if not math.isclose(value, expected, rel_tol=BETA_TOLERANCE)
        ]
    if scheduler.rescale_betas_zero_snr:
        problems.append("rescale_betas_zero_snr must be False: it changes the schedule; got True")
    if scheduler.variance_type not in _VARIANCES:
        problems.append(
            f"variance_type must be one of {', '.join(_VARIANCES)}{_variance_hint(scheduler.variance_type)}"
        )
    if scheduler.prediction_type not in _PREDICTIONS:
        problems.append(f"prediction_type must be 'epsilon' or 'sample'; got {scheduler.prediction_type!r}")
    _raise_if(problems, "the scheduler's process is not supported")

    return DiffusionConfig(
        num_timesteps=scheduler.num_train_timesteps,
        noise_schedule="linear" if scheduler.beta_schedule == "linear" else "cosine",
        variance=_VARIANCES[scheduler.variance_type],
        prediction=_PREDICTIONS[scheduler.prediction_type],
    )


def _linear_ends(num_timesteps: int) -> tuple[float, float]:
    return 0.1 / num_timesteps, 20 / num_timesteps


def _variance_hint(variance_type: str) -> str:
    reasons = {
        "learned": " (the network's output is a variance in the library, but a log variance here)",
        "fixed_large_log": " (the library takes the square root of a negative logarithm)",
    }
    return f"; got {variance_type!r}{reasons.get(variance_type, '')}"


def sampling_notes(scheduler: SchedulerConfig) -> list[str]:
    """Return notes about a scheduler's sampling options that are not imported; they are not part of the network."""
    notes = []
    if scheduler.thresholding or not scheduler.clip_sample or scheduler.clip_sample_range != 1.0:
        notes.append(
            f"clip_sample={scheduler.clip_sample}, clip_sample_range={scheduler.clip_sample_range:g}, "
            f"thresholding={scheduler.thresholding}: ignored, sampling here clamps x0 to [-1, 1]"
        )
    return notes


def _raise_if(problems: list[str], what: str) -> None:
    if problems:
        raise DoesNotMap(what + ":" + "".join(f"\n  {problem}" for problem in problems))
