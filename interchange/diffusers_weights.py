"""Convert a network's weights to and from the names and layouts of diffusers' UNet2DModel.

The values are the same: modules have other names, and attention computes q, k and v by three linear layers instead of
one convolution with interleaved channels. Average pooling has no counterpart; it is written as a convolution that
averages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.config import AttentionOrder, ModelConfig
from diffusion.unet import UNet

Weights = dict[str, Tensor]

_NAMES = {
    "plain": {"": ""},
    "resblock": {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    },
    "attention": {"norm": "group_norm"},  # qkv and proj_out change shape: see to_diffusers
    "downsample": {"op": "conv"},
    "upsample": {"conv": "conv"},
}
"""Parameters of a module by its kind: our name -> diffusers' name."""

_OLD_ATTENTION = re.compile(r"(\battentions\.\d+\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class _Module:
    """A module of both networks: its kind and its two names."""

    kind: str
    ours: str
    theirs: str
    heads: int = 0
    """Attention heads; 0 for other kinds."""


def to_diffusers(weights: Mapping[str, Tensor], model: ModelConfig) -> Weights:
    """Convert a network's weights to the names and layouts of UNet2DModel.

    Args:
        weights: our state dict; must fit `model`.
        model: the network; `diffusers_config.to_unet_config` must accept it.

    Returns:
        The UNet2DModel's state dict; no tensor shares memory with another.
    """
    theirs: Weights = {}
    for module in _modules(model):
        for ours_name, theirs_name in _parameters(module):
            if ours_name in weights:
                theirs[theirs_name] = weights[ours_name].clone()
        if module.kind == "attention":
            for leaf in ("weight", "bias"):
                qkv = weights[f"{module.ours}.qkv.{leaf}"]
                for part, tensor in zip("qkv", _split_qkv(qkv, module.heads, model.attention_order), strict=True):
                    theirs[f"{module.theirs}.to_{part}.{leaf}"] = _without_length(tensor).clone()
                projection = weights[f"{module.ours}.proj_out.{leaf}"]
                theirs[f"{module.theirs}.to_out.0.{leaf}"] = _without_length(projection).clone()
        if module.kind in ("downsample", "upsample") and not model.conv_resample:
            like = weights[f"{_last_resblock(module.ours)}.out_layers.3.weight"]
            theirs |= _fixed_resampling(module, like)
    return theirs


def from_diffusers(theirs: Mapping[str, Tensor], model: ModelConfig, flip_sin_to_cos: bool) -> Weights:
    """Convert a UNet2DModel's weights to our names and layouts.

    Args:
        theirs: its state dict; must have the shapes of `expected_weights(model)`.
        model: our configuration of the network.
        flip_sin_to_cos: its field of that name. If False, its time embedding has the sines first, and the columns of
            the first linear layer are rotated.

    Returns:
        Our state dict; no tensor shares memory with another.

    Raises:
        ValueError: `conv_resample` is False, and a resampling convolution does not average.
    """
    ours: Weights = {}
    for module in _modules(model):
        for ours_name, theirs_name in _parameters(module):
            if theirs_name in theirs:
                ours[ours_name] = theirs[theirs_name].clone()
        if module.kind == "attention":
            for leaf in ("weight", "bias"):
                parts = [theirs[f"{module.theirs}.to_{part}.{leaf}"] for part in "qkv"]
                qkv = _join_qkv(parts, module.heads, model.attention_order)
                projection = theirs[f"{module.theirs}.to_out.0.{leaf}"].clone()
                ours[f"{module.ours}.qkv.{leaf}"] = _with_length(qkv)
                ours[f"{module.ours}.proj_out.{leaf}"] = _with_length(projection)
        if module.kind in ("downsample", "upsample") and not model.conv_resample:
            _drop_fixed_resampling(module, ours, theirs)
    if not flip_sin_to_cos:
        ours["time_embed.0.weight"] = ours["time_embed.0.weight"].roll(model.model_channels // 2, dims=1)
    return ours


def expected_weights(model: ModelConfig) -> Weights:
    """Return the state dict that a UNet2DModel of the network has, as meta tensors: names and shapes without data."""
    with torch.device("meta"):
        return to_diffusers(UNet(model).state_dict(), model)


def with_current_names(theirs: Mapping[str, Tensor]) -> Weights:
    """Rename the attention weights of files written before diffusers 0.12, as the library does when reading them."""
    return {_OLD_ATTENTION.sub(_current_name, name): tensor for name, tensor in theirs.items()}


def _current_name(match: re.Match[str]) -> str:
    return match[1] + _NEW_ATTENTION[match[2]]


def _modules(model: ModelConfig) -> Iterator[_Module]:
    yield _Module("plain", "time_embed.0", "time_embedding.linear_1")
    yield _Module("plain", "time_embed.2", "time_embedding.linear_2")
    yield _Module("plain", "label_emb", "class_embedding")
    yield _Module("plain", "input_blocks.0.0", "conv_in")
    yield from _encoder(model)
    yield _Module("resblock", "middle_block.0", "mid_block.resnets.0")
    yield _Module("attention", "middle_block.1", "mid_block.attentions.0", model.heads_for(model.level_channels[-1]))
    yield _Module("resblock", "middle_block.2", "mid_block.resnets.1")
    yield from _decoder(model)
    yield _Module("plain", "out.0", "conv_norm_out")
    yield _Module("plain", "out.2", "conv_out")


def _encoder(model: ModelConfig) -> Iterator[_Module]:
    index = 1
    levels = list(zip(model.level_channels, model.level_sizes, strict=True))
    for level, (channels, size) in enumerate(levels):
        ours, theirs = "input_blocks.{}", f"down_blocks.{level}"
        for block in range(model.num_res_blocks):
            yield _Module("resblock", f"{ours.format(index)}.0", f"{theirs}.resnets.{block}")
            if size in model.attention_resolutions:
                heads = model.heads_for(channels)
                yield _Module("attention", f"{ours.format(index)}.1", f"{theirs}.attentions.{block}", heads)
            index += 1
        if level != len(levels) - 1:
            kind = "resblock" if model.resblock_updown else "downsample"
            yield _Module(kind, f"{ours.format(index)}.0", f"{theirs}.downsamplers.0")
            index += 1


def _decoder(model: ModelConfig) -> Iterator[_Module]:
    index = 0
    levels = list(zip(model.level_channels, model.level_sizes, strict=True))
    for up, (channels, size) in enumerate(reversed(levels)):
        attends = size in model.attention_resolutions
        for block in range(model.num_res_blocks + 1):
            ours, theirs = f"output_blocks.{index}", f"up_blocks.{up}"
            yield _Module("resblock", f"{ours}.0", f"{theirs}.resnets.{block}")
            if attends:
                heads = model.heads_for(channels, model.num_heads_upsample)
                yield _Module("attention", f"{ours}.1", f"{theirs}.attentions.{block}", heads)
            if up != len(levels) - 1 and block == model.num_res_blocks:
                kind = "resblock" if model.resblock_updown else "upsample"
                yield _Module(kind, f"{ours}.{1 + attends}", f"{theirs}.upsamplers.0")
            index += 1


def _parameters(module: _Module) -> Iterator[tuple[str, str]]:
    for ours, theirs in _NAMES[module.kind].items():
        for leaf in ("weight", "bias"):
            yield (
                ".".join(filter(None, (module.ours, ours, leaf))),
                ".".join(filter(None, (module.theirs, theirs, leaf))),
            )


def _split_qkv(qkv: Tensor, heads: int, order: AttentionOrder) -> tuple[Tensor, ...]:
    """Split [3C, ...] into q, k and v, each [C, ...] in the order of heads."""
    rest = qkv.shape[1:]
    if order == "new":
        return qkv.reshape(3, -1, *rest).unbind(0)
    return tuple(part.reshape(-1, *rest) for part in qkv.reshape(heads, 3, -1, *rest).unbind(1))


def _join_qkv(parts: list[Tensor], heads: int, order: AttentionOrder) -> Tensor:
    rest = parts[0].shape[1:]
    if order == "new":
        return torch.cat(parts)
    return torch.stack([part.reshape(heads, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def _without_length(tensor: Tensor) -> Tensor:
    """Convert the weight of a convolution over positions [out, in, 1] to a linear layer's [out, in]; keep a bias."""
    return tensor.squeeze(-1) if tensor.ndim == 3 else tensor


def _with_length(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1) if tensor.ndim == 2 else tensor


def _last_resblock(ours: str) -> str:
    """Return the name of the residual block before a resampling layer."""
    side, index, _ = ours.split(".")
    return f"{side}.{int(index) - 1}.0" if side == "input_blocks" else f"{side}.{index}.0"


def _fixed_resampling(module: _Module, like: Tensor) -> Weights:
    """Return the 3x3 convolution [C, C, 3, 3] that computes average pooling, or the identity after upsampling.

    Pooling averages the pixels (2i, 2i + 1); the convolution of stride 2 reads (2i - 1, 2i, 2i + 1).
    """
    kernel = torch.zeros(3, 3, dtype=like.dtype, device=like.device)
    if module.kind == "downsample":
        kernel[1:, 1:] = 0.25
    else:
        kernel[1, 1] = 1.0
    identity = torch.eye(like.shape[0], dtype=like.dtype, device=like.device)
    name = f"{module.theirs}.conv"
    return {f"{name}.weight": identity[:, :, None, None] * kernel, f"{name}.bias": torch.zeros_like(identity[0])}


def _drop_fixed_resampling(module: _Module, ours: Weights, theirs: Mapping[str, Tensor]) -> None:
    fixed = _fixed_resampling(module, theirs[f"{module.theirs}.conv.weight"])
    if any(not torch.equal(theirs[name], tensor) for name, tensor in fixed.items()):
        raise ValueError(f"{module.theirs}.conv has trained weights: conv_resample must be True to keep them")
    for ours_name, _ in _parameters(module):
        del ours[ours_name]
