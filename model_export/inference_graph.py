"""Rewrite a network for compilers: the same function of the same weights, in operations that runtimes execute fast.

`model_export.inference_layers` describes the replacement of each layer and the reason.
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
    InputConv2d,
    Maps,
    NormSiLU,
    PlainLayer,
    TokenAttention,
    VectorNorm,
    plain_linear,
)

N = TypeVar("N", UNet, Classifier)


def rewrite(network: N, dtype: torch.dtype = torch.float32) -> N:
    """Return a rewritten copy of a network, with its own weights.

    Args:
        network: in eval mode; not changed.
        dtype: of convolutions, attention and the operations between them. Moments, softmax, embeddings, a classifier's
            head and the output are float32 in every precision.

    Returns:
        A network that computes the same function of the same arguments.
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    return InferenceUNet(copied, dtype) if isinstance(copied, UNet) else InferenceClassifier(copied, dtype)


class Stage(nn.Module):
    """A block of the network: its layers in sequence."""

    def __init__(self, block: nn.Module, places: Mapping[nn.Module, int], skip_channels: int = 0) -> None:
        """Rewrite a block's layers.

        Args:
            block: the original layers.
            places: for each residual block of the network, its index in `BlockEmbeddings`.
            skip_channels: channels of a second map, from a skip connection, that is passed to the first layer.
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
        """Run the layers, each on the output of the previous one."""
        for layer in self.layers:
            maps = [layer(maps, embeddings)]
        return maps[0]


class InferenceEncoder(nn.Module):
    """Encoder and middle block of a `Backbone`."""

    def __init__(self, network: Backbone, places: Mapping[nn.Module, int], input_layer: nn.Module) -> None:
        """Rewrite the blocks after the first, which is the input convolution alone.

        Args:
            network: the original network.
            places: for each residual block of the network, its index in `BlockEmbeddings`.
            input_layer: the input convolution, rewritten or not.
        """
        super().__init__()
        blocks = [*network.input_blocks[1:], network.middle_block]
        self.input_layer = input_layer
        self.blocks = nn.ModuleList(Stage(block, places) for block in blocks)

    def forward(self, x: Tensor, embeddings: Sequence[Tensor]) -> list[FeatureMap]:
        """Return every block's output, the middle block's last."""
        outputs = [FeatureMap(self.input_layer(x))]
        for block in self.blocks:
            outputs.append(block(outputs[-1:], embeddings))
        return outputs


class InferenceUNet(UNet):
    """A `UNet` with rewritten layers; it has its own encoder, so `encode` must not be called."""

    def __init__(self, network: UNet, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # all attributes are made from the network's
        self.config = network.config
        self.model_channels, self.time_embed = network.model_channels, _for_tracing(network.time_embed)
        if network.config.num_classes is not None:
            self.label_emb = network.label_emb
        self.embeddings, places = _embeddings(network)
        self.encoder = InferenceEncoder(network, places, InputConv2d(_input_conv(network)))
        skips = reversed(network.skip_channels)
        self.decoder = nn.ModuleList(Stage(block, places, next(skips)) for block in network.output_blocks)
        self.out = _for_tracing(network.out)
        _lower(self, dtype)

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        """Run encoder and decoder on the arguments of `UNet.denoise`."""
        embeddings = self.embeddings(emb)
        *skips, h = self.encoder(x, embeddings)
        for block in self.decoder:
            h = block([h, skips.pop()], embeddings)
        return self.out([h]).float()


class InferenceClassifier(Classifier):
    """A `Classifier` with rewritten layers; as for `InferenceUNet`, `encode` must not be called."""

    def __init__(self, network: Classifier, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # all attributes are made from the network's
        self.config, self.dtype, self.pools_features = network.config, dtype, network.pools_features
        self.model_channels, self.time_embed = network.model_channels, _for_tracing(network.time_embed)
        self.embeddings, places = _embeddings(network)
        self.encoder = InferenceEncoder(network, places, _input_conv(network))
        self.out = _for_tracing(network.out)
        _lower(self.encoder, dtype)

    def forward_emb(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        """Classify noisy images whose timesteps are already embedded."""
        maps = self.encoder(x_t.to(self.dtype), self.embeddings(emb_t))
        if self.pools_features:
            return self.out(torch.cat([m.moments.mean for m in maps], dim=1))
        return self.out([FeatureMap(maps[-1].x.float())])


def _embeddings(network: Backbone) -> tuple[BlockEmbeddings, dict[nn.Module, int]]:
    """Return the module that computes the embeddings of all residual blocks at once, and each block's index in it."""
    blocks = [module for module in network.modules() if isinstance(module, ResBlock)]
    return BlockEmbeddings(blocks), {block: place for place, block in enumerate(blocks)}


def _input_conv(network: Backbone) -> nn.Conv2d:
    (conv,) = network.input_blocks[0].children()
    assert isinstance(conv, nn.Conv2d)  # noqa: S101  # as `Backbone` makes it
    return conv


def _for_tracing(layers: nn.Sequential) -> nn.Sequential:
    """Rewrite a head or a time MLP; if its first layer normalises feature maps, that layer gets a list of one map."""
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
    """Convert feature maps to a lower precision; embeddings and moments stay float32."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | TokenAttention):
            module.to(dtype)
        elif isinstance(module, InferenceAttention):
            module.proj_out.to(dtype)
