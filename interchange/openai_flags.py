"""Convert the command-line flags of OpenAI's two repositories to a checkpoint's configuration.

Their `.pt` files hold weights only; the network is defined by the flags it was trained with. Defaults of the same flag
differ between the repositories, so a configuration is always resolved with the defaults of *its* repository.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import ValidationError

from diffusion.config import (
    CheckpointConfig,
    ClassifierCheckpointConfig,
    ClassifierConfig,
    ClassifierPool,
    DiffusionConfig,
    ModelConfig,
    NoiseSchedule,
)
from diffusion.quoting import quoted
from formats.checkpoint_config import AnyCheckpointConfig, describe_validation_error

Repo = Literal["improved", "guided"]
Kind = Literal["image", "superres", "classifier"]

NUM_CLASSES = 1000
"""Classes of every conditional model and classifier in OpenAI's code, independent of the data."""

IMAGE_CHANNELS = 3
"""Image channels in OpenAI's code."""

CLASSIFIER_HEAD_CHANNELS = 64
"""Width of the classifiers' attention heads; no flag sets it."""

CHANNEL_MULTS: dict[tuple[Repo, Kind], dict[int, tuple[float, ...]]] = {
    ("improved", "image"): {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)},
    ("improved", "superres"): {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)},
    ("guided", "image"): {
        64: (1, 2, 3, 4),
        128: (1, 1, 2, 3, 4),
        256: (1, 1, 2, 2, 4, 4),
        512: (0.5, 1, 1, 2, 2, 4, 4),
    },
    ("guided", "superres"): {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (1, 1, 2, 2, 4, 4)},
}
"""The default levels of each repository by image size. Classifiers use those of guided-diffusion's image models."""
CHANNEL_MULTS["guided", "classifier"] = CHANNEL_MULTS["guided", "image"]

TRAINING_FLAGS = (
    *("use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16", "classifier_use_fp16", "fp16_scale_growth"),
    *("data_dir", "val_data_dir", "schedule_sampler", "noised", "batch_size", "microbatch", "ema_rate", "iterations"),
    *("lr", "weight_decay", "lr_anneal_steps", "anneal_lr", "resume_checkpoint"),
    *("log_interval", "save_interval", "eval_interval"),
)
SAMPLING_FLAGS = (
    *("timestep_respacing", "clip_denoised", "num_samples", "use_ddim", "model_path", "base_samples"),
    *("classifier_path", "classifier_scale"),
)
WITHOUT_EFFECT = frozenset(TRAINING_FLAGS + SAMPLING_FLAGS)
"""Flags that do not change the network or its process; accepted so that users can paste a whole command line."""


@dataclass(frozen=True)
class Flag:
    """The parser of a flag's text, and its default."""

    read: Callable[[str], Any]
    default: Any


def parse_flag_line(line: str) -> dict[str, str]:
    """Parse flags as on a command line: `--image_size 64 --class_cond True`, or `--image_size=64`.

    Raises:
        ValueError: a word is neither a flag nor a flag's value, or a flag has no value.
    """
    flags: dict[str, str] = {}
    name: str | None = None
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"flags cannot be parsed: {error}; got {quoted(line)}") from error
    for word in words:
        if word.startswith("--"):
            if name is not None:
                raise ValueError(f"flag --{name} has no value (every flag of these repositories takes one)")
            name, equals, value = word[2:].partition("=")
            if equals:
                flags[name], name = value, None
        elif name is not None:
            flags[name], name = word, None
        else:
            raise ValueError(f"{word!r} is neither a flag nor a flag's value; flags look like --image_size 64")
    if name is not None:
        raise ValueError(f"flag --{name} has no value (every flag of these repositories takes one)")
    return flags


def config_from_flags(repo: Repo, flags: Mapping[str, str]) -> AnyCheckpointConfig:
    """Return the configuration for the flags that a network was trained with and the repository's other defaults.

    `large_size` or `small_size` select a super-resolution model; a flag `classifier_*` other than `classifier_scale`,
    `classifier_path` and `classifier_use_fp16` selects a noisy classifier; otherwise it is an image model. Some flags
    are not in OpenAI's code: `num_classes`, which is fixed at 1000 there; `channel_mult`, for the repository without
    it; and `image_channels`, which is fixed at 3 there. `in_channels` is another name for `image_channels` (not
    counting an appended low-resolution image), and `out_channels` implies it.

    Args:
        repo: `improved` (openai/improved-diffusion) or `guided` (openai/guided-diffusion).
        flags: by name, without the dashes; values as typed.

    Returns:
        The configuration; its provenance lists the flags and the ignored ones.

    Raises:
        ValueError: a flag or value is unknown; the message lists the allowed ones.
    """
    if repo not in get_args(Repo):
        raise ValueError(f"repo must be one of {list(get_args(Repo))}; got {repo!r}")
    kind = _kind(flags)
    known = known_flags(repo, kind)
    for name in flags:
        if name not in known and name not in WITHOUT_EFFECT:
            raise ValueError(_unknown_flag(name, repo, kind, known))
    values = {name: _read(name, flag, flags) for name, flag in known.items()}
    notes = [f"{name}: ignored, it has no effect on sampling" for name in flags if name in WITHOUT_EFFECT]
    try:
        config = _classifier(values, notes) if kind == "classifier" else _unet(repo, kind, values, notes)
    except ValidationError as error:
        raise ValueError(describe_validation_error(error)) from error
    return config.replace(provenance={"source": f"openai/{repo}-diffusion", "flags": dict(flags), "notes": notes})


def _kind(flags: Mapping[str, str]) -> Kind:
    if {"large_size", "small_size"} & flags.keys():
        return "superres"
    if any(name.startswith("classifier_") and name not in WITHOUT_EFFECT for name in flags):
        return "classifier"
    return "image"


def known_flags(repo: Repo, kind: Kind) -> dict[str, Flag]:
    """Return the flags that define a network or its process, with the repository's defaults."""
    if kind == "classifier":
        return _classifier_flags() if repo == "guided" else {}
    guided = repo == "guided"
    flags = {
        **_channel_flags(),
        "num_channels": Flag(_positive, 128),
        "num_res_blocks": Flag(_positive, 2),
        "num_heads": Flag(_positive, 4),
        "num_heads_upsample": Flag(_positive_or_minus_one, None),
        "attention_resolutions": Flag(_sizes, (16, 8)),
        "channel_mult": Flag(_multiples, None),
        "dropout": Flag(_fraction, 0.0),
        "class_cond": Flag(_boolean, False),
        "num_classes": Flag(_positive, None),
        "use_scale_shift_norm": Flag(_boolean, True),
        "learn_sigma": Flag(_boolean, False),
        **_process_flags(rescale_timesteps=not guided),
    }
    if kind == "superres":
        flags |= {"large_size": Flag(_positive, 256), "small_size": Flag(_positive, 64)}
    else:
        flags |= {"image_size": Flag(_positive, 64)}
    if guided:
        flags |= {"num_head_channels": Flag(_positive_or_minus_one, None), "resblock_updown": Flag(_boolean, False)}
    if guided and kind == "image":
        flags |= {"use_new_attention_order": Flag(_boolean, False)}
    if not guided and kind == "image":
        flags |= {"sigma_small": Flag(_boolean, False)}
    return flags


def _classifier_flags() -> dict[str, Flag]:
    return {
        "image_size": Flag(_positive, 64),
        **_channel_flags(),
        "channel_mult": Flag(_multiples, None),
        "num_classes": Flag(_positive, NUM_CLASSES),
        "classifier_width": Flag(_positive, 128),
        "classifier_depth": Flag(_positive, 2),
        "classifier_attention_resolutions": Flag(_sizes, (32, 16, 8)),
        "classifier_use_scale_shift_norm": Flag(_boolean, True),
        "classifier_resblock_updown": Flag(_boolean, True),
        "classifier_pool": Flag(_one_of(get_args(ClassifierPool)), "attention"),
        "learn_sigma": Flag(_boolean, False),  # of the process; not used by the classifier's training
        **_process_flags(rescale_timesteps=False),
    }


def _channel_flags() -> dict[str, Flag]:
    return {name: Flag(_positive, None) for name in ("image_channels", "in_channels", "out_channels")}


def _image_channels(values: Mapping[str, Any], outputs_per_channel: int | None) -> int:
    """Return the number of image channels from the flags that give or imply it; they must agree."""
    given = {name: values[name] for name in ("image_channels", "in_channels") if values[name] is not None}
    if outputs_per_channel is not None and (out_channels := values["out_channels"]) is not None:
        given["out_channels"], rest = divmod(out_channels, outputs_per_channel)
        if rest:
            raise ValueError(f"flag out_channels must be even with learn_sigma True; got {out_channels}")
    if len(set(given.values())) > 1:
        words = ", ".join(f"{name} means {channels}" for name, channels in given.items())
        raise ValueError(f"flags must agree on the number of image channels; {words}")
    return next(iter(given.values()), IMAGE_CHANNELS)


def _process_flags(rescale_timesteps: bool) -> dict[str, Flag]:
    return {
        "diffusion_steps": Flag(_positive, 1000),
        "noise_schedule": Flag(_one_of(get_args(NoiseSchedule)), "linear"),
        "predict_xstart": Flag(_boolean, False),
        "rescale_timesteps": Flag(_boolean, rescale_timesteps),
    }


def _unknown_flag(name: str, repo: Repo, kind: Kind, known: Mapping[str, Flag]) -> str:
    if kind == "classifier" and repo == "improved":
        return f"{name}: improved-diffusion has no classifiers; use repo 'guided'"
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    return (
        f"unknown flag {name!r} for a model of kind {kind!r} from {repo}-diffusion{hint} "
        f"Known flags: {', '.join(sorted(known))}"
    )


def _read(name: str, flag: Flag, flags: Mapping[str, str]) -> Any:
    if name not in flags:
        return flag.default
    try:
        return flag.read(flags[name].strip())
    except ValueError as error:
        raise ValueError(f"flag {name} must be {error}; got {flags[name]!r}") from error


def _unet(repo: Repo, kind: Kind, values: Mapping[str, Any], notes: list[str]) -> CheckpointConfig:
    size = values["large_size" if kind == "superres" else "image_size"]
    mults = values["channel_mult"] or _channel_mult(repo, kind, size)
    if values["num_classes"] is not None and not values["class_cond"]:
        raise ValueError("flag num_classes needs class_cond True: an unconditional model has no label embedding")
    model = ModelConfig(
        image_size=size,
        image_channels=_image_channels(values, 2 if values["learn_sigma"] else 1),
        model_channels=values["num_channels"],
        channel_mult=mults,
        num_res_blocks=values["num_res_blocks"],
        attention_resolutions=_attended_sizes(values["attention_resolutions"], size, len(mults), notes),
        num_heads=values["num_heads"],
        num_heads_upsample=values["num_heads_upsample"],
        num_head_channels=values.get("num_head_channels"),
        attention_order="new" if values.get("use_new_attention_order") else "legacy",
        use_scale_shift_norm=values["use_scale_shift_norm"],
        resblock_updown=values.get("resblock_updown", False),
        dropout=values["dropout"],
        num_classes=(values["num_classes"] or NUM_CLASSES) if values["class_cond"] else None,
        learn_sigma=values["learn_sigma"],
        low_res_size=values["small_size"] if kind == "superres" else None,
    )
    fixed: Literal["fixed_small", "fixed_large"] = "fixed_small" if values.get("sigma_small") else "fixed_large"
    return CheckpointConfig(
        model=model,
        diffusion=DiffusionConfig(
            num_timesteps=values["diffusion_steps"],
            noise_schedule=values["noise_schedule"],
            variance="learned_range" if values["learn_sigma"] else fixed,
            prediction="x0" if values["predict_xstart"] else "eps",
            rescale_timesteps=values["rescale_timesteps"],
        ),
    )


def _classifier(values: Mapping[str, Any], notes: list[str]) -> ClassifierCheckpointConfig:
    size = values["image_size"]
    mults = values["channel_mult"] or _channel_mult("guided", "classifier", size)
    model = ClassifierConfig(
        image_size=size,
        image_channels=_image_channels(values, None),
        model_channels=values["classifier_width"],
        channel_mult=mults,
        num_res_blocks=values["classifier_depth"],
        attention_resolutions=_attended_sizes(values["classifier_attention_resolutions"], size, len(mults), notes),
        num_head_channels=CLASSIFIER_HEAD_CHANNELS,
        use_scale_shift_norm=values["classifier_use_scale_shift_norm"],
        resblock_updown=values["classifier_resblock_updown"],
        num_classes=values["num_classes"],
        pool=values["classifier_pool"],
    )
    process = DiffusionConfig(
        num_timesteps=values["diffusion_steps"],
        noise_schedule=values["noise_schedule"],
        variance="fixed_large",
        rescale_timesteps=values["rescale_timesteps"],
    )
    return ClassifierCheckpointConfig(model=model, diffusion=process)


def _channel_mult(repo: Repo, kind: Kind, size: int) -> tuple[float, ...]:
    by_size = CHANNEL_MULTS[repo, kind]
    if size not in by_size:
        flag = "large_size" if kind == "superres" else "image_size"
        raise ValueError(f"flag {flag} must be one of {list(by_size)} unless channel_mult is given; got {size}")
    return by_size[size]


def _attended_sizes(named: tuple[int, ...], image_size: int, levels: int, notes: list[str]) -> tuple[int, ...]:
    """Map sizes to the levels with attention in the reference: those with downsampling factor image_size // size."""
    sizes = {1 << level: image_size >> level for level in range(levels)}
    absent = [size for size in named if image_size // size not in sizes]
    notes.extend(f"attention_resolutions: {size} is ignored, no level has this size" for size in absent)
    return tuple(sizes[image_size // size] for size in named if size not in absent)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError("a positive integer")
    return int(text)


def _positive_or_minus_one(text: str) -> int | None:
    if text != "-1" and not (text.isdecimal() and int(text) > 0):
        raise ValueError("a positive integer, or -1 for none")
    return None if text == "-1" else int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError("a number from 0 up to, but not including, 1")
    return value


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError("True or False")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ValueError("sizes in pixels separated by commas, such as 16,8") from error


def _multiples(text: str) -> tuple[float, ...] | None:
    if text == "":
        return None
    try:
        mults = tuple(float(part) for part in text.split(","))
    except ValueError:
        mults = (0.0,)
    if not all(0 < mult < float("inf") for mult in mults):
        raise ValueError("positive numbers separated by commas, such as 1,2,3,4")
    return mults


def _one_of(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text

    return read
