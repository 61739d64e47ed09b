"""Infer a network's flags from the names and shapes of its weights, to explain a mismatch.

A wrong flag changes hundreds of names and shapes at once. Therefore the flags of both networks, the file's and the
configured one, are inferred and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from diffusion.config import CheckpointConfig
from formats.checkpoint import Shapes, expected_shapes, shape_differences
from formats.checkpoint_config import AnyCheckpointConfig

UNET = "UNet"
CLASSIFIER = "noisy classifier"
CLASSIFIER_FLAGS = {
    "num_channels": "classifier_width",
    "num_res_blocks": "classifier_depth",
    "attention_resolutions": "classifier_attention_resolutions",
    "use_scale_shift_norm": "classifier_use_scale_shift_norm",
    "resblock_updown": "classifier_resblock_updown",
}
"""Names of the classifiers' flags, by the UNet's flag of the same meaning."""


ANCHOR = "time_embed.0.weight"
"""A weight that every network of these repositories has."""
INPUT_CHANNELS, OUTPUT_CHANNELS = "large_size, small_size", "learn_sigma"
"""Flags that change the number of input or output channels, as image_channels does."""
CHANNEL_FLAGS = frozenset({"image_channels", "in_channels", "out_channels"})


def channels_to_infer(config: AnyCheckpointConfig, shapes: Shapes) -> int | None:
    """Return the number of image channels inferred from the weights, if it differs from the configuration's default.

    None if a preset or a flag gives the number, if the weights agree with the default, or if they are ambiguous (6
    input channels may be an image of 3 channels and its low-resolution version).
    """
    provenance = config.provenance
    if "preset" in provenance or CHANNEL_FLAGS & provenance.get("flags", {}).keys():
        return None
    first, last = shapes.get("input_blocks.0.0.weight", ()), shapes.get("out.2.weight", ())
    if len(first) != 4:
        return None
    channels, rest = first[1], 0
    if isinstance(config, CheckpointConfig):
        if config.model.low_res_size is not None:
            channels, rest = divmod(channels, 2)
        elif channels == 2 * config.model.image_channels and last[:1] in ((channels // 2,), (channels,)):
            return None
        if last[:1] not in ((channels,), (2 * channels,)):
            return None
    return None if rest or channels == config.model.image_channels else channels


def describe_mismatch(config: AnyCheckpointConfig, shapes: Shapes) -> list[str]:
    """Return the differences between a file's network and the configured one; empty if it fits.

    Args:
        config: the configuration.
        shapes: name and shape of every weight in the file.

    Returns:
        One line per flag that differs, at most a dozen; a summary of the names if no flag explains the difference.
    """
    expected = expected_shapes(config)
    differences = shape_differences(expected, shapes)
    if not differences:
        return []
    found, wanted = read_flags(shapes, config.model.image_height), read_flags(expected, config.model.image_height)
    if not found:
        return [f"the file holds no network of these repositories: {_other_network(shapes)}"]
    if found["kind"] != wanted["kind"]:
        return [f"the file holds a {found['kind']}, the configuration describes a {wanted['kind']}"]
    names = {} if isinstance(config, CheckpointConfig) else CLASSIFIER_FLAGS
    if _channels_alone_differ(found, wanted):
        names = {**names, INPUT_CHANNELS: "image_channels"}
        del wanted[OUTPUT_CHANNELS]
    lines = [
        f"{names.get(flag, flag)}: the file has {found[flag]}, the configuration says {wanted[flag]}"
        for flag in wanted
        if flag in found and found[flag] != wanted[flag]
    ]
    return lines or differences


def _channels_alone_differ(found: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Return whether input and output channels differ only by the number of image channels."""
    if OUTPUT_CHANNELS not in found or found[INPUT_CHANNELS] == wanted[INPUT_CHANNELS]:
        return False
    ratios = [
        int(flags[OUTPUT_CHANNELS].split()[0]) / int(flags[INPUT_CHANNELS].split()[0]) for flags in (found, wanted)
    ]
    return ratios[0] == ratios[1]


def _other_network(shapes: Shapes) -> str:
    """Return which other project's network the names belong to, if known, and the cure."""
    if any(name.endswith("conv_in.weight") for name in shapes):
        return "its names are those of diffusers; import the folder with its config.json and scheduler_config.json"
    if any(name.startswith(("first_stage_model.", "model.diffusion_model.")) for name in shapes):
        return "it is a latent diffusion model, whose network does not work on pixels"
    if any("init_conv.weight" in name for name in shapes):
        return "its names are those of denoising-diffusion-pytorch, whose network has another architecture"
    return "time_embed and input_blocks are missing"


def read_flags(shapes: Shapes, image_size: int) -> dict[str, str]:
    """Infer flags from a network's names and shapes.

    These flags cannot be inferred: number and layout of attention heads, dropout, image size (except with the
    classifiers' attention pool), and all flags of the process: schedule, T, rescaling, prediction type.

    Args:
        shapes: name and shape of every weight.
        image_size: used only to name levels by their size in pixels.

    Returns:
        The value of each flag, as text; empty for an unknown network.
    """
    first = "input_blocks.1.0."
    if not {"time_embed.0.weight", "input_blocks.0.0.weight", f"{first}out_layers.3.weight"} <= shapes.keys():
        return {}
    classifier = not any(name.startswith("output_blocks.") for name in shapes)
    width = shapes["time_embed.0.weight"][1]
    flags = {
        "kind": CLASSIFIER if classifier else UNET,
        "num_channels": str(width),
        "use_scale_shift_norm": str(
            shapes[f"{first}emb_layers.1.weight"][0] == 2 * shapes[f"{first}out_layers.3.weight"][0]
        ),
        INPUT_CHANNELS: f"{shapes['input_blocks.0.0.weight'][1]} input channels",
        **(_classifier_head(shapes) if classifier else _unet_head(shapes)),
    }
    if layout := _layout(shapes):
        levels, blocks = layout
        starts = [1 + level * (blocks + 1) for level in range(levels)]
        mults = [shapes[f"input_blocks.{start}.0.out_layers.3.weight"][0] / width for start in starts]
        attended = [image_size >> level for level, start in enumerate(starts) if _attends(shapes, start)]
        flags |= {
            "channel_mult": ",".join(f"{mult:g}" for mult in mults),
            "num_res_blocks": str(blocks),
            "attention_resolutions": ",".join(map(str, attended)) or "none",
            "resblock_updown": str(levels > 1 and f"input_blocks.{blocks + 1}.0.out_layers.3.weight" in shapes),
        }
    return flags


def _unet_head(shapes: Shapes) -> dict[str, str]:
    labels = shapes.get("label_emb.weight")
    return {
        "num_classes": "none (class_cond False)" if labels is None else str(labels[0]),
        OUTPUT_CHANNELS: f"{shapes.get('out.2.weight', (0,))[0]} output channels",
    }


def _classifier_head(shapes: Shapes) -> dict[str, str]:
    if positions := shapes.get("out.2.positional_embedding"):
        size = round((positions[1] - 1) ** 0.5)
        logits, pool = shapes.get("out.2.c_proj.weight", (0,))[0], f"attention over {size}x{size} positions"
    elif "out.3.weight" in shapes and len(shapes["out.3.weight"]) == 4:
        logits, pool = shapes["out.3.weight"][0], "adaptive"
    elif "out.3.weight" in shapes:
        logits, pool = shapes["out.3.weight"][0], "spatial_v2"
    else:
        logits, pool = shapes.get("out.2.weight", (0,))[0], "spatial"
    return {"num_classes": str(logits), "classifier_pool": pool}


def _layout(shapes: Shapes) -> tuple[int, int] | None:
    """Infer the number of levels, and of residual blocks per level; None if it is not one of these networks."""
    blocks_there = _indices(shapes, r"input_blocks\.(\d+)\.")
    total = max(blocks_there) + 1
    resamplings = _resamplings(shapes, total - len(blocks_there))
    for levels, blocks in _candidates(total):
        starts = [1 + level * (blocks + 1) for level in range(levels)]
        if resamplings in (None, levels - 1) and all(_is_level(shapes, start, blocks, total) for start in starts):
            return levels, blocks
    return None


def _candidates(total: int) -> Iterator[tuple[int, int]]:
    # The encoder has `blocks` residual blocks per level, a resampling layer after each level but the last, and the
    # first convolution: levels * (blocks + 1) in all. Try more levels first: if one level is read as two, `_is_level`
    # fails by attention or width; if two levels are read as one, it often does not.
    return ((levels, total // levels - 1) for levels in range(total // 2, 0, -1) if total % levels == 0)


def _is_level(shapes: Shapes, start: int, blocks: int, total: int) -> bool:
    residual = all(f"input_blocks.{start + i}.0.out_layers.3.weight" in shapes for i in range(blocks))
    same_attention = len({_attends(shapes, start + i) for i in range(blocks)}) == 1
    downsampling = start + blocks  # does not exist after the last level
    same_width = not any(
        f"input_blocks.{i}.0.skip_connection.weight" in shapes for i in range(start + 1, min(downsampling + 1, total))
    )
    return residual and same_attention and same_width and not _attends(shapes, downsampling)


def _attends(shapes: Shapes, block: int) -> bool:
    return f"input_blocks.{block}.1.qkv.weight" in shapes


def _resamplings(shapes: Shapes, absent_blocks: int) -> int | None:
    """Count the resampling layers; None for a classifier whose residual blocks resample."""
    # A convolution has weights; average pooling has none, so its block is absent.
    if count := absent_blocks + len(_indices(shapes, r"input_blocks\.(\d+)\.0\.op\.weight")):
        return count
    if any(name.startswith("output_blocks.") for name in shapes):
        return len(_indices(shapes, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight"))
    return None


def _indices(shapes: Shapes, pattern: str) -> set[int]:
    compiled = re.compile(pattern)
    return {int(match.group(1)) for name in shapes if (match := compiled.match(name))}
