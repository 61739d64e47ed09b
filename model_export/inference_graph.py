"""A network rewritten for compilers: the same function of the same weights, in operations that runtimes do well.

What the CPU profile of the plain graph showed, and what is done about it (docs/decisions/0006-inference-graph.md):

- Group normalisation over [B, 32, ...] makes a runtime leave its blocked layout and come back, and OpenVINO's own
  operation crashes in float32 on some machines. Here the moments are pooled per channel, averaged over the
  channels of a group, and normalisation, affine and timestep conditioning are one multiply-add per element.
- The sigmoid of SiLU is the dearest thing per element. silu(v) = h + h tanh(h) with h = v / 2, and the half is folded
  into the multiply-add, exactly.
- Attention is written on tokens, in the pattern that runtimes fuse; the scale lies in the weights of q.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.classifier import AttentionPool, Classifier
from diffusion.config import AttentionOrder
from diffusion.unet import AttentionBlock, EmbedSequential, ResBlock, RowLinear, UNet

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
    mean = _group_mean(_map_mean(x.float()), norm.num_groups)  # [B, C]
    centred = x - mean[:, :, None, None].to(x.dtype)
    variance = _group_mean(_map_mean(torch.square(centred.float())), norm.num_groups)
    a = torch.rsqrt(variance + norm.eps) * norm.weight
    b = norm.bias[None]
    if scale is not None and shift is not None:
        gain = 1 + scale
        a, b = a * gain, b * gain + shift
    a, b = (factor * a).to(x.dtype), (factor * b).to(x.dtype)
    return centred * a[:, :, None, None] + b[:, :, None, None]


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


def token_attention(tokens: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """Self-attention of tokens [B, L, C] whose scale is already in weight and bias; returns [B, L, C].

    Args:
        tokens: the sequence.
        weight: [3C, C], rows laid out [q|k|v][head].
        bias: [3C].
        num_heads: heads.
    """
    _, length, channels = tokens.shape
    qkv = F.linear(tokens, weight, bias).reshape(-1, length, 3, num_heads, channels // num_heads)
    q, k, v = qkv.unbind(2)  # each [B, L, heads, ch]
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)  # [B, heads, L, L]
    weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2).reshape(-1, length, channels)


def _token_weights(qkv: nn.Conv1d, num_heads: int, order: AttentionOrder) -> tuple[Tensor, Tensor]:
    """Return weight [3C, C] and bias [3C] in the layout [q|k|v][head], the scale ch^-1/2 multiplied into q."""
    channels = qkv.in_channels
    ch = channels // num_heads
    assert qkv.bias is not None  # noqa: S101  # ours always have one
    both = torch.cat([qkv.weight[:, :, 0], qkv.bias[:, None]], dim=1)  # [3C, C + 1]
    if order == "legacy":
        both = both.reshape(num_heads, 3, ch, channels + 1).transpose(0, 1).reshape(3 * channels, channels + 1)
    both = torch.cat([both[:channels] * ch**-0.5, both[channels:]])
    return both[:, :channels].contiguous(), both[:, channels].contiguous()


class InferenceAttention(nn.Module):
    """An `AttentionBlock` on tokens."""

    weight: Tensor
    bias: Tensor

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.num_heads = block.num_heads
        self.norm = block.norm
        weight, bias = _token_weights(block.qkv, block.num_heads, block.order)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.proj_out = _linear(block.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        tokens = normalize(x, self.norm).permute(0, 2, 3, 1).reshape(-1, height * width, channels)  # [B, L, C]
        out = self.proj_out(token_attention(tokens, self.weight, self.bias, self.num_heads))
        return x + out.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


class InferenceAttentionPool(nn.Module):
    """An `AttentionPool` on tokens."""

    weight: Tensor
    bias: Tensor

    def __init__(self, pool: AttentionPool) -> None:
        super().__init__()
        self.num_heads = pool.num_heads
        self.positional_embedding = pool.positional_embedding
        weight, bias = _token_weights(pool.qkv_proj, pool.num_heads, "new")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.c_proj = _linear(pool.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [B, C, L]
        tokens = torch.cat([flat.mean(dim=2, keepdim=True), flat], dim=2) + self.positional_embedding
        pooled = token_attention(tokens.transpose(1, 2), self.weight, self.bias, self.num_heads)
        return self.c_proj(pooled[:, 0])  # [B, num_classes]


def _group_norm(module: nn.Module) -> nn.GroupNorm:
    assert isinstance(module, nn.GroupNorm)  # noqa: S101  # the layers of a ResBlock
    return module


def _plain_linear(rows: RowLinear) -> nn.Linear:
    """Return the layer without its blocks of rows, which would tie the graph to the batch size it was traced at."""
    linear = nn.Linear(rows.in_features, rows.out_features)
    linear.load_state_dict(rows.state_dict())
    return linear.requires_grad_(False)


def _linear(conv: nn.Conv1d) -> nn.Linear:
    linear = nn.Linear(conv.in_channels, conv.out_channels)
    assert conv.bias is not None  # noqa: S101  # ours always have one
    linear.load_state_dict({"weight": conv.weight[:, :, 0], "bias": conv.bias})
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
            module.weight, module.bias = module.weight.to(dtype), module.bias.to(dtype)
            module.proj_out.to(dtype)
    network.input_blocks[0] = EmbedSequential(Cast(dtype), *network.input_blocks[0].children())
    if head is not None:
        network.out = nn.Sequential(Cast(torch.float32), *head.children())
