"""A network rewritten for compilers: the same function of the same weights, in operations that runtimes do well.

What the CPU profile of the plain graph showed, and what is done about it (docs/decisions/0006-inference-graph.md):

- Group normalisation over [B, 32, ...] makes a runtime leave its blocked layout and come back, and OpenVINO's own
  operation crashes in float32 on some machines. Here the moments are pooled per channel, averaged over the
  channels of a group, and normalisation, affine and timestep conditioning are one multiply-add per element.
- The sigmoid of SiLU is the dearest thing per element. silu(v) = h + h tanh(h) with h = v / 2, and the half is folded
  into the multiply-add, exactly.
- Attention is written on tokens, in the pattern that runtimes fuse; the scale lies in the weights of q. q, k and v
  are three products: cutting one into three costs more than it saves.
- A convolution after upsampling sees each pixel four times: on the small map it is one of 2x2 with four times the
  channels, which are the pixels' four places.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.classifier import AttentionPool, Classifier
from diffusion.config import AttentionOrder
from diffusion.unet import AttentionBlock, EmbedSequential, ResBlock, RowLinear, UNet, Upsample

N = TypeVar("N", UNet, Classifier)


def rewrite(network: N, dtype: torch.dtype = torch.float32) -> N:
    """Return a copy of a network, rewritten, that computes in a precision.

    Args:
        network: in eval mode; left as it is.
        dtype: of convolutions, attention and what lies between. Moments, softmax, embeddings and the output
            are float32 in every precision.

    Returns:
        A network with the same methods.
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ResBlock):
                setattr(parent, name, InferenceResBlock(child))
            elif isinstance(child, AttentionBlock):
                setattr(parent, name, InferenceAttention(child))
            elif isinstance(child, AttentionPool):
                setattr(parent, name, InferenceAttentionPool(child))
            elif isinstance(child, Upsample) and child.conv is not None:
                setattr(parent, name, InferenceUpsample(child.conv))
            elif isinstance(child, RowLinear):
                setattr(parent, name, _plain_linear(child))
    if isinstance(copied.out, nn.Sequential) and isinstance(copied.out[0], nn.GroupNorm):
        copied.out = nn.Sequential(NormSiLU(copied.out[0]), *list(copied.out.children())[2:])
    if dtype != torch.float32:
        _lower(copied, dtype)
    return copied


def normalize(
    x: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None, factor: float = 1.0
) -> Tensor:
    """Return factor * (GroupNorm(x) (1 + scale) + shift), GroupNorm with its learned affine.

    Args:
        x: [B, C, H, W].
        norm: groups, weight, bias and eps.
        scale: [B, C], or None for zeros.
        shift: [B, C], or None for zeros.
        factor: best a power of two, which changes no bit but the exponent.

    Returns:
        Shaped like x, of x's precision; moments are float32.
    """
    mean = _group_mean(_map_mean(x.float()), norm.num_groups)[:, :, None, None].to(x.dtype)  # [B, C, 1, 1]
    # The other way round than below: a runtime would keep x - mean, and writing it costs more than subtracting again
    variance = _group_mean(_map_mean(torch.square((mean - x).float())), norm.num_groups)  # [B, C]
    a = torch.rsqrt(variance + norm.eps) * norm.weight
    b = norm.bias[None]
    if scale is not None and shift is not None:
        gain = 1 + scale
        a, b = a * gain, b * gain + shift
    a, b = (factor * a).to(x.dtype), (factor * b).to(x.dtype)
    return (x - mean) * a[:, :, None, None] + b[:, :, None, None]


def silu_of_twice(h: Tensor) -> Tensor:
    """Return silu(2 h) = h + h tanh(h)."""
    return h + h * torch.tanh(h)


def _map_mean(x: Tensor) -> Tensor:
    """Average [B, C, H, W] over each map, by pooling: OpenVINO pools on all cores, and reduces four times slower."""
    size = x.shape[2:]
    return F.avg_pool2d(x, size, stride=size).flatten(1)  # [B, C]


def _group_mean(per_channel: Tensor, groups: int) -> Tensor:
    """Average [B, C] over the channels of each group, for every channel."""
    channels = per_channel.shape[1]
    grouped = per_channel.reshape(-1, groups, channels // groups)
    return grouped.mean(dim=2, keepdim=True).expand(grouped.shape).reshape(-1, channels)


class NormSiLU(nn.Module):
    """silu(GroupNorm(x))."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return silu_of_twice(normalize(x, self.norm, factor=0.5))


class InferenceResBlock(ResBlock):
    """A `ResBlock` over the same layers; a subclass, because the backbone hands the embedding to those."""

    def __init__(self, block: ResBlock) -> None:
        nn.Module.__init__(self)
        self.use_scale_shift_norm = block.use_scale_shift_norm
        self.norm_in, self.conv_in = _group_norm(block.in_layers[0]), block.in_layers[-1]
        self.resample = block.resample
        self.emb_layers = block.emb_layers
        self.norm_out, self.conv_out = _group_norm(block.out_layers[0]), block.out_layers[-1]
        self.skip_connection = block.skip_connection

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = silu_of_twice(normalize(x, self.norm_in, factor=0.5))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        emb_out = self.emb_layers(emb)  # float32 [B, C' or 2C']
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = normalize(h, self.norm_out, scale, shift, factor=0.5)
        else:
            h = normalize(h + emb_out[:, :, None, None].to(h.dtype), self.norm_out, factor=0.5)
        h = self.conv_out(silu_of_twice(h))
        return self.skip_connection(x) + h


class TokenAttention(nn.Module):
    """Self-attention of tokens [B, L, C], from a layer of q, k and v for all; its scale ch^-1/2 lies in q."""

    def __init__(self, qkv: nn.Conv1d, num_heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.num_heads = num_heads
        channels = qkv.in_channels
        ch = channels // num_heads
        assert qkv.bias is not None  # noqa: S101  # ours always have one
        both = torch.cat([qkv.weight[:, :, 0], qkv.bias[:, None]], dim=1)  # [3C, C + 1]
        if order == "legacy":
            both = both.reshape(num_heads, 3, ch, channels + 1).transpose(0, 1).reshape(3 * channels, channels + 1)
        q, k, v = both.chunk(3)  # each [heads * ch, C + 1]
        self.q, self.k, self.v = (_linear(part[:, :channels], part[:, channels]) for part in (q * ch**-0.5, k, v))

    def forward(self, tokens: Tensor) -> Tensor:
        # Else a trace of the gradient multiplies by copies of the weights (docs/decisions/0007-classifier-gradient.md)
        tokens = tokens.contiguous()
        _, length, channels = tokens.shape
        shape = (-1, length, self.num_heads, channels // self.num_heads)
        q, k, v = (layer(tokens).reshape(shape) for layer in (self.q, self.k, self.v))
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)  # [B, heads, L, L]
        weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        return (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(-1, length, channels)


class InferenceAttention(nn.Module):
    """An `AttentionBlock` on tokens."""

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.norm = block.norm
        self.attention = TokenAttention(block.qkv, block.num_heads, block.order)
        self.proj_out = _pointwise(block.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        tokens = normalize(x, self.norm).permute(0, 2, 3, 1).reshape(-1, height * width, channels)  # [B, L, C]
        out = self.proj_out(self.attention(tokens))
        return x + out.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


class InferenceAttentionPool(nn.Module):
    """An `AttentionPool` on tokens."""

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.attention = TokenAttention(pool.qkv_proj, pool.num_heads, "new")
        self.c_proj = _pointwise(pool.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [B, C, L]
        tokens = torch.cat([flat.mean(dim=2, keepdim=True), flat], dim=2) + self.positional_embedding
        pooled = self.attention(tokens.transpose(1, 2))
        return self.c_proj(pooled[:, 0])  # [B, num_classes]


class InferenceUpsample(nn.Module):
    """An `Upsample` and its convolution [O, I, 3, 3] in one: padded by 1, of 2x2, to 4 O channels on the small map.

    Along an axis, an even pixel of the large map sees the small pixels (i - 1, i), weighted (w0, w1 + w2), and an odd
    one (i, i + 1), weighted (w0 + w1, w2). Both are windows of two, the odd one's a place further. Shuffled with the
    odd one first, the pixels therefore come in order, one place late: there is a frame of 1 to be cut off.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        odd, even = torch.tensor([[1.0, 1, 0], [0, 0, 1]]), torch.tensor([[1.0, 0, 0], [0, 1, 1]])  # [window, kernel]
        seen = torch.stack([odd, even])
        folded = torch.einsum("oiyx,amy,bnx->oabimn", conv.weight, seen, seen)  # [O, 2, 2, I, 2, 2]
        assert conv.bias is not None  # noqa: S101  # ours always have one
        self.conv = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1)
        self.conv.load_state_dict({"weight": folded.flatten(0, 2), "bias": conv.bias.repeat_interleave(4)})
        self.conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)[:, :, 1:-1, 1:-1]


def _group_norm(module: nn.Module) -> nn.GroupNorm:
    assert isinstance(module, nn.GroupNorm)  # noqa: S101  # the layers of a ResBlock
    return module


def _plain_linear(rows: RowLinear) -> nn.Linear:
    """Return the layer without its blocks of rows, which would tie the graph to the batch size it was traced at."""
    linear = nn.Linear(rows.in_features, rows.out_features)
    linear.load_state_dict(rows.state_dict())
    return linear.requires_grad_(False)


def _pointwise(conv: nn.Conv1d) -> nn.Linear:
    assert conv.bias is not None  # noqa: S101  # ours always have one
    return _linear(conv.weight[:, :, 0], conv.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear.requires_grad_(False)


class Cast(nn.Module):
    """Change a feature map's precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def _lower(network: UNet | Classifier, dtype: torch.dtype) -> None:
    """Let feature maps be of a lower precision; embeddings, norms, a classifier's head and the output stay float32."""
    head = None
    if isinstance(network, Classifier):
        head, network.out = network.out, nn.Sequential()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
        elif isinstance(module, InferenceAttention):
            module.attention.to(dtype)
            module.proj_out.to(dtype)
    network.input_blocks[0] = EmbedSequential(Cast(dtype), *network.input_blocks[0].children())
    if head is not None:
        network.out = nn.Sequential(Cast(torch.float32), *head.children())
