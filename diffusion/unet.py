"""The IDDPM/ADM UNet, super-resolution included, with the weight names of OpenAI's released state dicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusion.config import AttentionOrder, BackboneConfig, ModelConfig
from diffusion.network_inputs import NetworkInputs

M = TypeVar("M", bound=nn.Module)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return the sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5), cosines first as OpenAI does.

    Args:
        t: timesteps [B], integer or fractional.
        dim: width of the embedding; an odd width ends in a column of zeros.
        max_period: the longest wavelength is 2 pi times this.

    Returns:
        float32 [B, dim], computed in float32 also under autocast.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class RowLinear(nn.Linear):
    """A linear layer whose result for a row depends on no other row, except in training.

    CPU libraries choose the kernel of a matrix product by the number of rows, and some by the place of a row and the
    number of threads too, so the last bits of a row's result depend on the batch. These layers have one row per image.
    Multiplying one row at a time costs next to nothing and makes an image's pixels independent of its neighbours.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return torch.cat([super(RowLinear, self).forward(row) for row in torch.split(x, 1)])


def _zero(module: M) -> M:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Downsample(nn.Module):
    """Halve the feature map's size, by a strided convolution or by average pooling."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.op: nn.Module = (
            nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the feature map's size by nearest neighbour, optionally followed by a convolution."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding of timestep and class (IDDPM appendix A; ADM section 3)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        config: BackboneConfig,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = config.use_scale_shift_norm
        self.in_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = resample
        emb_out_channels = 2 * out_channels if config.use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), RowLinear(config.emb_channels, emb_out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[:-1](x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[-1](h)  # [B, C', H', W']
        emb_out = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


def attend(qkv: Tensor, num_heads: int, order: AttentionOrder) -> Tensor:
    """Compute scaled dot-product attention over positions.

    Args:
        qkv: [B, 3C, L]; channels are laid out [head][q|k|v][ch] (legacy) or [q|k|v][head][ch] (new).
        num_heads: number of heads; each has C / num_heads channels.
        order: the layout of qkv.

    Returns:
        [B, C, L].
    """
    batch, channels, length = qkv.shape
    if order == "legacy":
        q, k, v = qkv.reshape(batch, num_heads, 3, -1, length).unbind(2)  # each [B, heads, ch, L]
    else:
        q, k, v = qkv.reshape(batch, 3, num_heads, -1, length).unbind(1)
    out = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
    return out.transpose(2, 3).reshape(batch, channels // 3, length)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, with a residual connection."""

    def __init__(self, channels: int, num_heads: int, config: BackboneConfig) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.order: AttentionOrder = config.attention_order
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [B, C, L]
        h = attend(self.qkv(self.norm(flat)), self.num_heads, self.order)
        h = self.proj_out(h)
        return (flat + h).reshape(x.shape)


class EmbedSequential(nn.Sequential):
    """A sequence of layers that passes the embedding to its residual blocks."""

    recompute = False
    """Whether the backward pass computes residual and attention blocks again, instead of keeping their activations."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # takes one more argument
        for layer in self:
            inputs = (x, emb) if isinstance(layer, ResBlock) else (x,)
            if self.recompute and isinstance(layer, ResBlock | AttentionBlock):
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x


class Backbone(nn.Module):
    """The part that the UNet and the noisy classifier share: time embedding, encoder and middle block."""

    def __init__(self, config: BackboneConfig, in_channels: int, mid_channels: int) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(
            RowLinear(config.model_channels, config.emb_channels),
            nn.SiLU(),
            RowLinear(config.emb_channels, config.emb_channels),
        )
        self.model_channels = config.model_channels

        ch = config.level_channels[0]
        self.input_blocks = nn.ModuleList([EmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
        self.skip_channels = [ch]
        for level, out_ch in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(ch, out_ch, config)]
                ch = out_ch
                if config.level_sizes[level] in config.attention_resolutions:
                    layers.append(AttentionBlock(ch, config.heads_for(ch), config))
                self._append_input_block(layers, ch)
            if level != len(config.channel_mult) - 1:
                self._append_input_block([self._downsample(ch, config)], ch)

        self.middle_block = EmbedSequential(
            ResBlock(ch, mid_channels, config),
            AttentionBlock(ch, config.heads_for(ch), config),
            ResBlock(ch, ch, config),
        )

    def _append_input_block(self, layers: Iterable[nn.Module], channels: int) -> None:
        self.input_blocks.append(EmbedSequential(*layers))
        self.skip_channels.append(channels)

    @staticmethod
    def _downsample(channels: int, config: BackboneConfig) -> nn.Module:
        if config.resblock_updown:
            return ResBlock(channels, channels, config, resample=Downsample(channels, use_conv=False))
        return Downsample(channels, config.conv_resample)

    def embed_timesteps(self, t: Tensor) -> Tensor:
        """Return emb_t, the time MLP's output: float32 [B, 4C], also under autocast.

        Args:
            t: the network's timestep input [B], integer or fractional (`Process.t_model`).
        """
        with torch.autocast(t.device.type, enabled=False):
            return self.time_embed(timestep_embedding(t, self.model_channels))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Run the encoder and the middle block; return every block's output, the middle block's last."""
        outputs: list[Tensor] = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb)
            outputs.append(h)
        outputs.append(self.middle_block(h, emb))
        return outputs


class UNet(Backbone):
    """Predict eps (or x0) and var_values from x_t, the timestep and the class.

    This class implements the networks of improved-diffusion and guided-diffusion; with `ModelConfig.low_res_size` it
    is their SuperResModel, whose caller enlarges the low-resolution images. Parameter names equal theirs, so a
    published state dict loads strictly.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.in_channels, config.level_channels[-1])
        self.config = config
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_labels, config.emb_channels)

        skip_channels = list(self.skip_channels)
        ch = skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for level, out_ch in reversed(list(enumerate(config.level_channels))):
            for block in range(config.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(ch + skip_channels.pop(), out_ch, config)]
                ch = out_ch
                if config.level_sizes[level] in config.attention_resolutions:
                    heads = config.heads_for(ch, config.num_heads_upsample)
                    layers.append(AttentionBlock(ch, heads, config))
                if level and block == config.num_res_blocks:
                    layers.append(self._upsample(ch, config))
                self.output_blocks.append(EmbedSequential(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, ch), nn.SiLU(), _zero(nn.Conv2d(ch, config.out_channels, 3, padding=1))
        )

    @staticmethod
    def _upsample(channels: int, config: ModelConfig) -> nn.Module:
        if config.resblock_updown:
            return ResBlock(channels, channels, config, resample=Upsample(channels, use_conv=False))
        return Upsample(channels, config.conv_resample)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Embed the timesteps and return `forward_emb`'s output, with the same errors.

        Args:
            x_t: noisy images [B, C, H, W].
            t: the network's timestep input [B] (`Process.t_model`).
            y: labels int64 [B], for a conditional model.
            cond: conditioning images [B, C', H, W], for a model with `cond_shape`.
        """
        return self.forward_emb(x_t, self.embed_timesteps(t), y, cond)

    def run(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Return `forward_emb`'s output for inputs in one named tuple, with the same errors."""
        return self.forward_emb(*inputs)

    def forward_emb(self, x_t: Tensor, emb_t: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Run the network on embedded timesteps, the form that low-precision graphs need.

        Args:
            x_t: noisy images [B, C, H, W], in the units where data spans [-1, 1].
            emb_t: float32 [B, 4 model_channels], from `embed_timesteps`.
            y: labels int64 [B] below `ModelConfig.num_labels`; for class-conditional models only, which need it.
            cond: conditioning images [B, C', H, W]; for models with `ModelConfig.cond_shape` only, which need it. Of a
                super-resolution model, the enlarged low-resolution images (`diffusion.conditioning.enlarged`).

        Returns:
            float32 [B, out_channels, H, W]: eps (or x0), followed by var_values if the model has them.

        Raises:
            ValueError: y or cond is missing, or given to a model that does not take it.
        """
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("y must be given to a class-conditional model, and only to one")
        if (cond is None) != (self.config.cond_shape is None):
            raise ValueError("cond must be given to a model with conditioning channels, and only to one")
        emb = emb_t
        if y is not None:
            emb = emb + self.label_emb(y)
        return self.denoise(x_t if cond is None else torch.cat([x_t, cond], dim=1), emb)

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        """Run encoder and decoder; return what `forward_emb` returns.

        Args:
            x: [B, in_channels, H, W]: noisy images, followed by the conditioning images.
            emb: float32 [B, 4 model_channels], the embedding of timestep and class.
        """
        *skips, h = self.encode(x, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h).float()
