"""Layers of a network rewritten for compilers: each computes the same function as the original layer.

Findings of the CPU profile of the plain graph, and the changes made (docs/decisions/0006-inference-graph.md):

- Group normalisation over [B, 32, ...] makes a runtime convert to and from its blocked layout, and OpenVINO's own
  operation crashes in float32 on some machines. Here moments are pooled per channel, once per feature map however
  many layers use them, and combined into groups; normalisation, affine and timestep conditioning are one
  multiply-add per element.
- The sigmoid of SiLU is the most expensive elementwise operation. silu(v) = h + h tanh(h) with h = v / 2, and the half
  is folded into the multiply-add, exactly.
- Feature maps are never concatenated: a convolution of two concatenated maps is the sum of two convolutions.
- Attention is written on tokens, in the pattern that runtimes fuse; the scale is folded into the weights of q. q and v
  are two products, because slicing one product costs more than it saves. k is needed channels first, which a
  convolution returns.
- A convolution after nearest upsampling reads each pixel four times: on the small map it is a 2x2 convolution with
  four times the channels, one set for each of the four positions.
- The input convolution reads x_t in two parts, because its rounding to bfloat16 hides the noise at small t.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.classifier import AttentionPool
from diffusion.config import AttentionOrder
from diffusion.unet import AttentionBlock, ResBlock, RowLinear, Upsample


class Moments(NamedTuple):
    """Moments of the channels of a feature map, float32 [B, C] each."""

    mean: Tensor
    variance: Tensor


class FeatureMap:
    """A feature map [B, C, H, W] with cached moments, computed at first use.

    Moments of the encoder's maps are used twice: by the next block, and by the decoder's block across the skip
    connection.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def moments(self) -> Moments:
        """Mean and variance of each channel."""
        mean = _map_mean(self.x.float())  # [B, C, 1, 1]
        # Opposite order to `InferenceNorm`: a runtime would store x - mean, and writing it costs more
        # than subtracting again. The variance is that of the centred map: in bfloat16, E[x^2] - E[x]^2 is noise.
        centred = mean.to(self.x.dtype) - self.x
        return Moments(mean.flatten(1), _map_mean(torch.square(centred.float())).flatten(1))


Maps: TypeAlias = Sequence[FeatureMap]
"""Input of a layer: maps that are treated as if they were concatenated along the channels."""


def silu_of_twice(h: Tensor) -> Tensor:
    """Return silu(2 h) = h + h tanh(h)."""
    return h + h * torch.tanh(h)


def _map_mean(x: Tensor) -> Tensor:
    """Average [B, C, H, W] over each map by pooling, which in OpenVINO is four times faster than a reduction."""
    size = x.shape[2:]
    return F.avg_pool2d(x, size, stride=size)  # [B, C, 1, 1]


class InferenceNorm(nn.Module):
    """Group normalisation of concatenated maps; a group may extend over two of them."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups, self.group_size = norm.num_groups, norm.num_channels // norm.num_groups
        members = torch.eye(self.groups).repeat_interleave(self.group_size, dim=0)
        self.spread = _linear(members)  # [B, groups] -> [B, C]

    def forward(
        self, maps: Maps, scale: Tensor | None = None, shift: Tensor | None = None, factor: float = 1.0
    ) -> list[Tensor]:
        """Return factor * (GroupNorm(x) (1 + scale) + shift), GroupNorm with its learned affine, map by map.

        Args:
            maps: [B, C_i, H, W] each.
            scale: [B, sum of C_i], or None for zeros.
            shift: [B, sum of C_i], or None for zeros.
            factor: preferably a power of two, which changes only the exponent.

        Returns:
            Shaped like the maps, in their precision; moments are float32.
        """
        channel_mean, channel_variance = (torch.cat(parts, 1) for parts in zip(*(m.moments for m in maps), strict=True))
        mean = self._group_mean(channel_mean)
        variance = self._group_mean(channel_variance + torch.square(channel_mean - mean))
        a = torch.rsqrt(variance + self.eps) * self.weight
        b = self.bias[None]
        if scale is not None and shift is not None:
            gain = 1 + scale
            a, b = a * gain, b * gain + shift
        a, b = factor * a, factor * b
        ends = [0, *accumulate(m.x.shape[1] for m in maps)]
        return [
            (m.x - _as_map(mean, m, start, end)) * _as_map(a, m, start, end) + _as_map(b, m, start, end)
            for m, (start, end) in zip(maps, pairwise(ends), strict=True)
        ]

    def _group_mean(self, per_channel: Tensor) -> Tensor:
        """Average [B, C] over the channels of each group, for every channel."""
        if self.group_size == 1:
            return per_channel
        # Not a second matrix product: OpenVINO fuses two of them at some batch sizes, which changes the rounding
        return self.spread(per_channel.reshape(-1, self.groups, self.group_size).mean(dim=2))


def _as_map(per_channel: Tensor, of: FeatureMap, start: int, end: int) -> Tensor:
    """Return some channels of [B or 1, C] as [B or 1, end - start, 1, 1], in a map's precision."""
    return per_channel[:, start:end, None, None].to(of.x.dtype)


class SumConv2d(nn.Module):
    """A convolution (odd kernel, stride 1, same size) of concatenated maps: the sum of one convolution per map."""

    def __init__(self, conv: nn.Conv2d, channels: Sequence[int]) -> None:
        super().__init__()
        size = conv.kernel_size[0]
        self.convs = nn.ModuleList()
        for weight in torch.split(conv.weight, list(channels), dim=1):
            first = not self.convs
            part = nn.Conv2d(weight.shape[1], conv.out_channels, size, padding=size // 2, bias=first)
            part.load_state_dict({"weight": weight, "bias": conv.bias} if first else {"weight": weight})
            self.convs.append(part.requires_grad_(False))

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        first, *others = (conv(x) for conv, x in zip(self.convs, xs, strict=True))
        return sum(others, first)


class InputConv2d(nn.Module):
    """The network's input convolution, which keeps the noise of its input in bfloat16.

    At small t, the noise in x_t is as small as the rounding error of x_t in bfloat16. The float32 input is split into a
    multiple of 1/32, exact in bfloat16 up to 8, and a remainder up to 1/64. Both are convolved with the same weights.
    """

    GRID = 32.0

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None  # noqa: S101  # this project's layers always have one
        size = conv.kernel_size[0]
        self.conv = nn.Conv2d(2 * conv.in_channels, conv.out_channels, size, padding=size // 2)
        self.conv.load_state_dict({"weight": conv.weight.repeat(1, 2, 1, 1), "bias": conv.bias})
        self.conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        coarse = torch.round(x * self.GRID) * (1 / self.GRID)
        return self.conv(torch.cat([coarse, x - coarse], 1).to(self.conv.weight.dtype))


class InferenceResBlock(nn.Module):
    """A `ResBlock` on concatenated maps."""

    def __init__(self, block: ResBlock, skip_channels: int, place: int) -> None:
        """Build the layers of a block.

        Args:
            block: the original block.
            skip_channels: channels of the second input map; 0 if the block has one input map.
            place: the block's index in `BlockEmbeddings`.
        """
        super().__init__()
        norm_in, conv_in = _norm_and_conv(block.in_layers)
        norm_out, conv_out = _norm_and_conv(block.out_layers)
        own = norm_in.num_channels - skip_channels
        channels = [own, skip_channels] if skip_channels else [own]
        self.use_scale_shift_norm = block.use_scale_shift_norm
        self.place = place
        self.norm_in, self.conv_in = InferenceNorm(norm_in), SumConv2d(conv_in, channels)
        self.norm_out, self.conv_out = InferenceNorm(norm_out), conv_out
        self.resample = block.resample
        skip = block.skip_connection
        self.skip_connection = SumConv2d(skip, channels) if isinstance(skip, nn.Conv2d) else None

    def forward(self, maps: Maps, embeddings: Sequence[Tensor]) -> FeatureMap:
        hs = [silu_of_twice(h) for h in self.norm_in(maps, factor=0.5)]
        xs = [m.x for m in maps]
        if self.resample is not None:
            hs, xs = [self.resample(h) for h in hs], [self.resample(x) for x in xs]
        h = self.conv_in(hs)
        emb_out = embeddings[self.place]  # float32 [B, C' or 2C']
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            (h,) = self.norm_out([FeatureMap(h)], scale, shift, factor=0.5)
        else:
            (h,) = self.norm_out([FeatureMap(h + emb_out[:, :, None, None].to(h.dtype))], factor=0.5)
        h = self.conv_out(silu_of_twice(h))
        (x,) = xs if self.skip_connection is None else (self.skip_connection(xs),)  # an identity has one map only
        return FeatureMap(x + h)


class BlockEmbeddings(nn.Module):
    """The embedding layers of all residual blocks, in one product."""

    def __init__(self, blocks: Sequence[ResBlock]) -> None:
        super().__init__()
        layers = [layer for block in blocks for layer in block.emb_layers if isinstance(layer, nn.Linear)]
        self.sizes = [layer.out_features for layer in layers]
        self.layer = _linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))

    def forward(self, emb: Tensor) -> Sequence[Tensor]:
        """Return float32 [B, C' or 2C'] for each block."""
        return self.layer(F.silu(emb)).split(self.sizes, dim=1)


class TokenAttention(nn.Module):
    """Self-attention over a feature map, from a combined layer of q, k and v; the scale ch^-1/2 is folded into q."""

    def __init__(self, qkv: nn.Conv1d, num_heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.num_heads = num_heads
        channels = qkv.in_channels
        ch = channels // num_heads
        assert qkv.bias is not None  # noqa: S101  # this project's layers always have one
        both = torch.cat([qkv.weight[:, :, 0], qkv.bias[:, None]], dim=1)  # [3C, C + 1]
        if order == "legacy":
            both = both.reshape(num_heads, 3, ch, channels + 1).transpose(0, 1).reshape(3 * channels, channels + 1)
        q, k, v = both.chunk(3)  # each [heads * ch, C + 1]
        self.q, self.v = (_linear(part[:, :channels], part[:, channels]) for part in (q * ch**-0.5, v))
        self.k = nn.Conv2d(channels, channels, 1)
        self.k.load_state_dict({"weight": k[:, :channels, None, None], "bias": k[:, channels]})
        self.k.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, L, C] for a map [B, C, H, W] with L = H W."""
        channels, length, ch = x.shape[1], x.shape[2] * x.shape[3], x.shape[1] // self.num_heads
        # Otherwise a trace of the gradient multiplies by copies of the weights
        # (docs/decisions/0007-classifier-gradient.md)
        tokens = x.permute(0, 2, 3, 1).reshape(-1, length, channels).contiguous()
        q, v = (layer(tokens).reshape(-1, length, self.num_heads, ch).transpose(1, 2) for layer in (self.q, self.v))
        scores = q @ self.k(x).reshape(-1, self.num_heads, ch, length)  # [B, heads, L, L]
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        return (weights @ v).transpose(1, 2).reshape(-1, length, channels)


class InferenceAttention(nn.Module):
    """An `AttentionBlock` on tokens."""

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.norm = InferenceNorm(block.norm)
        self.attention = TokenAttention(block.qkv, block.num_heads, block.order)
        self.proj_out = _pointwise(block.proj_out)

    def forward(self, maps: Maps, _: Sequence[Tensor]) -> FeatureMap:
        x = maps[0].x
        channels, height, width = x.shape[1:]
        (normalized,) = self.norm(maps)
        out = self.proj_out(self.attention(normalized))
        return FeatureMap(x + out.reshape(-1, height, width, channels).permute(0, 3, 1, 2))


class InferenceAttentionPool(nn.Module):
    """An `AttentionPool` on tokens."""

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.attention = TokenAttention(pool.qkv_proj, pool.num_heads, "new")
        self.c_proj = _pointwise(pool.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [B, C, L]
        with_mean = torch.cat([flat.mean(dim=2, keepdim=True), flat], dim=2) + self.positional_embedding
        pooled = self.attention(with_mean[:, :, None])  # a map of one line
        return self.c_proj(pooled[:, 0])  # [B, num_classes]


class InferenceUpsample(nn.Module):
    """An `Upsample` and its convolution [O, I, 3, 3]: one of 2x2, padded by 1, to 4 O channels on the small map.

    Along an axis, an even pixel of the large map depends on the small pixels (i - 1, i), weighted (w0, w1 + w2), and an
    odd one on (i, i + 1), weighted (w0 + w1, w2). Both are windows of two; that of the odd pixel is shifted by one. If
    the odd pixels come first in the shuffle, the result is in order but shifted by one: a frame of 1 is cropped.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        odd, even = torch.tensor([[1.0, 1, 0], [0, 0, 1]]), torch.tensor([[1.0, 0, 0], [0, 1, 1]])  # [window, kernel]
        seen = torch.stack([odd, even])
        folded = torch.einsum("oiyx,amy,bnx->aboimn", conv.weight, seen, seen)  # [2, 2, O, I, 2, 2]
        assert conv.bias is not None  # noqa: S101  # this project's layers always have one
        self.conv = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1)
        self.conv.load_state_dict({"weight": folded.flatten(0, 2), "bias": conv.bias.repeat(4)})
        self.conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        # Not F.pixel_shuffle, which expects the four positions of a channel next to each other: it moves single
        # numbers, and this moves pixels with all their channels
        places = self.conv(x)
        _, channels, height, width = places.shape
        shuffled = places.reshape(-1, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
        return shuffled.reshape(-1, channels // 4, 2 * height, 2 * width)[:, :, 1:-1, 1:-1]


class PlainLayer(nn.Module):
    """A layer on tensors, used between layers on feature maps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = InferenceUpsample(layer.conv) if isinstance(layer, Upsample) and layer.conv is not None else layer

    def forward(self, maps: Maps, _: Sequence[Tensor]) -> FeatureMap:
        return FeatureMap(self.layer(maps[0].x))


class NormSiLU(nn.Module):
    """silu(GroupNorm(x)) of a single map, as a tensor."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = InferenceNorm(norm)

    def forward(self, maps: Maps) -> Tensor:
        (h,) = self.norm(maps, factor=0.5)
        return silu_of_twice(h)


class VectorNorm(nn.Module):
    """Group normalisation of vectors [B, C], not maps.

    PyTorch treats a vector as a map of one pixel: the gradient then sums over an axis of size 1, and OpenVINO computes
    such a sum between products incorrectly (docs/decisions/0007-classifier-gradient.md).
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.groups, self.group_size = norm.num_groups, norm.num_channels // norm.num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise within each group, and apply the learned affine."""
        members = x.reshape(-1, self.groups, self.group_size)
        centred = members - members.mean(dim=2, keepdim=True)
        variance = torch.square(centred).mean(dim=2, keepdim=True)
        normalized = centred * torch.rsqrt(variance + self.eps)
        return normalized.reshape(-1, self.groups * self.group_size) * self.weight + self.bias


def plain_linear(rows: RowLinear) -> nn.Linear:
    """Return the layer without its blocks of rows, which would fix the graph to the traced batch size."""
    return _linear(rows.weight, rows.bias)


def _norm_and_conv(layers: nn.Sequential) -> tuple[nn.GroupNorm, nn.Conv2d]:
    norm, conv = layers[0], layers[-1]
    assert isinstance(norm, nn.GroupNorm)  # noqa: S101  # as `ResBlock` makes them
    assert isinstance(conv, nn.Conv2d)  # noqa: S101
    return norm, conv


def _pointwise(conv: nn.Conv1d) -> nn.Linear:
    return _linear(conv.weight[:, :, 0], conv.bias)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return linear.requires_grad_(False)
