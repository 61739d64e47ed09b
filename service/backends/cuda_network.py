"""The UNet as it runs on a CUDA device: the same function of the same weights, on maps stored channels-last.

- Weights are converted once, instead of by autocast at every call.
- Group normalisation, scale and shift, and SiLU are one operation (`triton_norm`; PyTorch's operations without Triton).
- Attention is computed on tokens [B, L, C], which channels-last maps are without a copy. Its q, k and v then have unit
  stride along the channels of a head, as flash attention requires.
- The embedding layers of all residual blocks are one product, always of the same number of rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.config import AttentionOrder
from diffusion.unet import AttentionBlock, EmbedSequential, ResBlock, UNet

log = logging.getLogger(__name__)


class GroupNorm(Protocol):
    """Group normalisation with its affine, then scale and shift, then SiLU."""

    def __call__(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        silu: bool,
    ) -> Tensor:
        """Return GroupNorm(x) (1 + scale) + shift, or its SiLU, in the precision and layout of x."""
        ...


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    silu: bool,
) -> Tensor:
    """Implement `GroupNorm` with PyTorch's operations, in float32.

    Args:
        x: [B, C, H, W].
        groups: number of groups; divides C.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        scale: float32 [B, C]; None: no scale and shift.
        shift: as scale.
        silu: whether SiLU follows.
    """
    h = F.group_norm(x.float(), groups, weight.float(), bias.float(), eps)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if silu:
        h = F.silu(h)
    return h.to(x.dtype, memory_format=torch.channels_last)


def fastest_group_norm(device: torch.device) -> GroupNorm:
    """Return the Triton kernels if they run on a CUDA device and are right there, else PyTorch's operations.

    Logs a warning about the latter.
    """
    x = torch.linspace(-3, 5, 8 * 9, device=device).reshape(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.linspace(1, 2, 8, device=device), torch.linspace(-1, 1, 8, device=device)
    expected = group_norm(x, 2, weight, bias, 1e-5, silu=True)
    try:
        from service.backends.triton_norm import triton_group_norm

        torch.testing.assert_close(triton_group_norm(x, 2, weight, bias, 1e-5, silu=True), expected)
    except Exception as error:  # Triton is missing, or it has no C compiler, no folder for its cache, ...
        log.warning("group normalisation runs without Triton, more slowly: %s", error)
        return group_norm
    return triton_group_norm


class CudaNorm(nn.Module):
    """A group normalisation with float32 weights."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.Module, normalise: GroupNorm) -> None:
        super().__init__()
        assert isinstance(norm, nn.GroupNorm)  # noqa: S101  # as all of these networks have
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("bias", norm.bias.detach().float())
        self._normalise = normalise

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, silu: bool) -> Tensor:
        return self._normalise(x, self.groups, self.weight, self.bias, self.eps, scale, shift, silu=silu)


class CudaResBlock(nn.Module):
    """A `ResBlock`; `columns` are its columns in the product of all embedding layers."""

    def __init__(self, block: ResBlock, columns: slice, normalise: GroupNorm) -> None:
        super().__init__()
        self.norm_in, self.conv_in = CudaNorm(block.in_layers[0], normalise), block.in_layers[-1]
        self.norm_out, self.conv_out = CudaNorm(block.out_layers[0], normalise), block.out_layers[-1]
        self.resample, self.skip_connection = block.resample, block.skip_connection
        self.use_scale_shift_norm = block.use_scale_shift_norm
        self.columns = columns

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        h = self.norm_in(x, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        emb_out = embeddings[:, self.columns]  # float32 [B, C' or 2C']
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.norm_out(h, scale, shift, silu=True)
        else:
            h = self.norm_out(h + emb_out[:, :, None, None].to(h.dtype), silu=True)
        return self.skip_connection(x) + self.conv_out(h)


class CudaAttention(nn.Module):
    """An `AttentionBlock` on tokens."""

    def __init__(self, block: AttentionBlock, normalise: GroupNorm) -> None:
        super().__init__()
        self.norm = CudaNorm(block.norm, normalise)
        self.num_heads = block.num_heads
        self.order: AttentionOrder = block.order
        self.qkv, self.proj_out = _as_linear(block.qkv), _as_linear(block.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x, silu=False).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        qkv = self.qkv(tokens)  # [B, L, 3C]
        if self.order == "legacy":
            parts = qkv.reshape(batch, height * width, self.num_heads, 3, -1).unbind(3)
        else:
            parts = qkv.reshape(batch, height * width, 3, self.num_heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)  # [B, heads, L, ch]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens.shape)
        h = self.proj_out(attended).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + h


class CudaUNet(nn.Module):
    """A `UNet` for inference on a CUDA device."""

    def __init__(self, network: UNet, dtype: torch.dtype, normalise: GroupNorm, most_rows: int) -> None:
        """Take over the layers of a network, which keeps only what `embed_timesteps` needs.

        Args:
            network: in eval mode, on its device.
            dtype: precision of convolutions, attention and feature maps.
            normalise: implementation of group normalisation.
            most_rows: the largest batch size; the product of the embedding layers always has this many rows.
        """
        super().__init__()
        self.config = network.config
        self.dtype, self.most_rows = dtype, most_rows
        self.label_emb = network.label_emb if network.config.num_classes is not None else None
        blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
        self.embed = _all_embeddings(blocks)
        ends = [0]
        self._columns: dict[ResBlock, slice] = {}
        for block in blocks:
            ends.append(ends[-1] + _embedding_layer(block).out_features)
            self._columns[block] = slice(ends[-2], ends[-1])

        def converted(layers: Sequence[nn.Module]) -> nn.ModuleList:
            return nn.ModuleList([self._converted(layer, normalise) for layer in layers])

        self.input_blocks = nn.ModuleList([converted([*block]) for block in _sequences(network.input_blocks)])
        self.middle_block = converted([*network.middle_block])
        self.output_blocks = nn.ModuleList([converted([*block]) for block in _sequences(network.output_blocks)])
        self.norm_out, self.conv_out = CudaNorm(network.out[0], normalise), network.out[-1]
        del self._columns, network.input_blocks, network.middle_block, network.output_blocks, network.out
        for module in self.modules():
            if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and module is not self.embed):
                module.to(dtype)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        self.requires_grad_(requires_grad=False)

    def _converted(self, layer: nn.Module, normalise: GroupNorm) -> nn.Module:
        if isinstance(layer, ResBlock):
            return CudaResBlock(layer, self._columns[layer], normalise)
        return CudaAttention(layer, normalise) if isinstance(layer, AttentionBlock) else layer

    def forward(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Return what `UNet.forward_emb` returns."""
        emb = emb_t if self.label_emb is None or y is None else emb_t + self.label_emb(y)
        rows = len(emb)
        # The same number of rows in every batch: a library selects its kernel, and its rounding, by that number
        embeddings = self.embed(F.pad(F.silu(emb), (0, 0, 0, self.most_rows - rows)))[:rows]
        x = x_t if cond is None else torch.cat([x_t, cond], dim=1)
        h = x.to(self.dtype, memory_format=torch.channels_last)
        skips = []
        for block in self.input_blocks:
            h = _run(block, h, embeddings)
            skips.append(h)
        h = _run(self.middle_block, h, embeddings)
        for block in self.output_blocks:
            h = _run(block, torch.cat([h, skips.pop()], dim=1), embeddings)
        out: Tensor = self.conv_out(self.norm_out(h, silu=True))
        return out.to(torch.float32, memory_format=torch.contiguous_format)


def _run(layers: nn.Module, h: Tensor, embeddings: Tensor) -> Tensor:
    assert isinstance(layers, nn.ModuleList)  # noqa: S101
    for layer in layers:
        h = layer(h, embeddings) if isinstance(layer, CudaResBlock) else layer(h)
    return h


def _sequences(blocks: nn.ModuleList) -> list[EmbedSequential]:
    return [block for block in blocks if isinstance(block, EmbedSequential)]


def _embedding_layer(block: ResBlock) -> nn.Linear:
    layer = block.emb_layers[-1]
    assert isinstance(layer, nn.Linear)  # noqa: S101
    return layer


def _all_embeddings(blocks: Sequence[ResBlock]) -> nn.Linear:
    layers = [_embedding_layer(block) for block in blocks]
    return _linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def _as_linear(conv: nn.Conv1d) -> nn.Linear:
    assert conv.bias is not None  # noqa: S101
    return _linear(conv.weight[:, :, 0], conv.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=weight.dtype)
    layer.weight, layer.bias = (nn.Parameter(values.detach().clone(), requires_grad=False) for values in (weight, bias))
    return layer
