"""A network rewritten for compilers: the same function of the same weights, in operations that runtimes do well.

`model_export.inference_layers` says what becomes of each layer, and why.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffusion.classifier import AttentionPool, Classifier
from diffusion.unet import AttentionBlock, Backbone, ResBlock, RowLinear, UNet
from model_export.inference_layers import (
    BlockEmbeddings,
    FeatureMap,
    InferenceAttention,
    InferenceAttentionPool,
    InferenceResBlock,
    Maps,
    NormSiLU,
    PlainLayer,
    TokenAttention,
    VectorNorm,
    plain_linear,
)

N = TypeVar("N", UNet, Classifier)


def rewrite(network: N, dtype: torch.dtype = torch.float32) -> N:
    """Return a network rewritten, with weights of its own.

    Args:
        network: in eval mode; left as it is.
        dtype: of convolutions, attention and what lies between. Moments, softmax, embeddings, a classifier's head and
            the output are float32 in every precision.

    Returns:
        A network that computes the same, for the same arguments.
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    return InferenceUNet(copied, dtype) if isinstance(copied, UNet) else InferenceClassifier(copied, dtype)


class Stage(nn.Module):
    """A block of the network: its layers, one after the other."""

    def __init__(self, block: nn.Module, places: Mapping[nn.Module, int], skip_channels: int = 0) -> None:
        """Rewrite a block's layers.

        Args:
            block: where they come from.
            places: of each residual block of the network, which of `BlockEmbeddings` is its own.
            skip_channels: of a second map, from across a skip connection, which the first layer is given.
        """
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in block.children():
            if isinstance(layer, ResBlock):
                self.layers.append(InferenceResBlock(layer, skip_channels, places[layer]))
            elif isinstance(layer, AttentionBlock):
                self.layers.append(InferenceAttention(layer))
            else:
                self.layers.append(PlainLayer(layer))
            skip_channels = 0

    def forward(self, maps: Maps, embeddings: Sequence[Tensor]) -> FeatureMap:
        """Run the layers, each on what the one before it returned."""
        for layer in self.layers:
            maps = [layer(maps, embeddings)]
        return maps[0]


class InferenceEncoder(nn.Module):
    """Encoder and middle block of a `Backbone`."""

    def __init__(self, network: Backbone, places: Mapping[nn.Module, int]) -> None:
        super().__init__()
        blocks = [*network.input_blocks, network.middle_block]
        self.blocks = nn.ModuleList(Stage(block, places) for block in blocks)

    def forward(self, x: Tensor, embeddings: Sequence[Tensor]) -> list[FeatureMap]:
        """Return every block's output, the middle block's last."""
        outputs = [FeatureMap(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1:], embeddings))
        return outputs[1:]


class InferenceUNet(UNet):
    """A `UNet` with its layers rewritten; the encoder is one of its own, so `encode` is not to be called."""

    def __init__(self, network: UNet, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # all it has is made from the network's
        self.config, self.dtype = network.config, dtype
        self.model_channels, self.time_embed = network.model_channels, _for_tracing(network.time_embed)
        if network.config.num_classes is not None:
            self.label_emb = network.label_emb
        self.embeddings, places = _embeddings(network)
        self.encoder = InferenceEncoder(network, places)
        skips = reversed(network.skip_channels)
        self.decoder = nn.ModuleList(Stage(block, places, next(skips)) for block in network.output_blocks)
        self.out = _for_tracing(network.out)
        _lower(self, dtype)

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        """Run encoder and decoder on what `UNet.denoise` takes."""
        embeddings = self.embeddings(emb)
        *skips, h = self.encoder(x.to(self.dtype), embeddings)
        for block in self.decoder:
            h = block([h, skips.pop()], embeddings)
        return self.out([h]).float()


class InferenceClassifier(Classifier):
    """A `Classifier` with its layers rewritten; as for `InferenceUNet`, `encode` is not to be called."""

    def __init__(self, network: Classifier, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # all it has is made from the network's
        self.config, self.dtype, self.pools_features = network.config, dtype, network.pools_features
        self.model_channels, self.time_embed = network.model_channels, _for_tracing(network.time_embed)
        self.embeddings, places = _embeddings(network)
        self.encoder = InferenceEncoder(network, places)
        self.out = _for_tracing(network.out)
        _lower(self.encoder, dtype)

    def forward_emb(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        """Classify noisy images whose timesteps are already embedded."""
        maps = self.encoder(x_t.to(self.dtype), self.embeddings(emb_t))
        if self.pools_features:
            return self.out(torch.cat([m.moments.mean for m in maps], dim=1))
        return self.out([FeatureMap(maps[-1].x.float())])


def _embeddings(network: Backbone) -> tuple[BlockEmbeddings, dict[nn.Module, int]]:
    """Return what embeds for all residual blocks at once, and the place that each of them has in it."""
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    return BlockEmbeddings(blocks), {block: place for place, block in enumerate(blocks)}


def _for_tracing(layers: nn.Sequential) -> nn.Sequential:
    """Rewrite a head or a time MLP, whose first layer, if it normalises feature maps, is given a list of one."""
    norm, *others = layers
    if isinstance(norm, nn.GroupNorm):
        return nn.Sequential(NormSiLU(norm), *map(_layer_for_tracing, others[1:]))
    return nn.Sequential(*map(_layer_for_tracing, layers))


def _layer_for_tracing(layer: nn.Module) -> nn.Module:
    if isinstance(layer, RowLinear):
        return plain_linear(layer)
    if isinstance(layer, nn.GroupNorm):
        return VectorNorm(layer)
    return InferenceAttentionPool(layer) if isinstance(layer, AttentionPool) else layer


def _lower(network: nn.Module, dtype: torch.dtype) -> None:
    """Let feature maps be of a lower precision; embeddings and moments stay float32."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | TokenAttention):
            module.to(dtype)
        elif isinstance(module, InferenceAttention):
            module.proj_out.to(dtype)
