"""The noisy classifier of ADM, whose gradient guides sampling, with the weight names of OpenAI's state dicts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.config import ClassifierConfig
from diffusion.unet import Backbone, RowLinear, attend

SPATIAL_HIDDEN = 2048
"""Width of the hidden layer in the heads `spatial` and `spatial_v2`."""


class AttentionPool(nn.Module):
    """Pool a feature map by attention from its mean to every position (CLIP's head, as ADM uses it)."""

    def __init__(self, channels: int, positions: int, head_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # [B, C, L]
        tokens = torch.cat([flat.mean(dim=2, keepdim=True), flat], dim=2) + self.positional_embedding  # [B, C, 1 + L]
        pooled = attend(self.qkv_proj(tokens), self.num_heads, "new")  # always new, whatever order the blocks use
        return self.c_proj(pooled)[:, :, 0]  # [B, num_classes]


class Classifier(Backbone):
    """Predict the class of a noisy image from x_t and the timestep (ADM, arXiv:2105.05233, section 4).

    The UNet's encoder and middle block with a pooling head; guided-diffusion calls it EncoderUNetModel. With the pool
    `attention`, which has one embedding per position, images must have the size of the configuration.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, config.image_channels, config.level_channels[-1])
        self.config = config
        self.pools_features = config.pool in ("spatial", "spatial_v2")
        ch = config.level_channels[-1]
        self.out = (
            _features_head(sum(self.skip_channels) + ch, config) if self.pools_features else _map_head(ch, config)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Classify noisy images.

        Args:
            x_t: noisy images [B, C, H, W], in the units where data spans [-1, 1].
            t: the network's timestep input [B], integer or fractional (`Process.t_model`).

        Returns:
            float32 logits [B, num_classes].
        """
        return self.forward_emb(x_t, self.embed_timesteps(t))

    def forward_emb(self, x_t: Tensor, emb_t: Tensor) -> Tensor:
        """Classify noisy images whose timesteps are already embedded: emb_t is float32 [B, 4 model_channels]."""
        encoded = self.encode(x_t, emb_t)
        features = encoded[-1]
        if self.pools_features:
            features = torch.cat([h.mean(dim=(2, 3)) for h in encoded], dim=1)  # [B, channels of all blocks]
        return self.out(features).float()


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    y: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """Return the gradient of log p(y | x_t) by x_t, times scale (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

    Args:
        classifier: (x_t, t) -> logits [B, num_classes].
        x_t: noisy images [B, C, H, W].
        t: the classifier's timestep input [B], the same as the network's (`Process.t_model`).
        y: labels int64 [B].
        scale: classifier_scale, a number, or one per row [B]; 0 = off.

    Returns:
        The gradient, shaped like x_t and detached. Works under torch.no_grad.
    """
    gradient = log_p_gradient(classifier, x_t, t, y)
    return gradient * torch.as_tensor(scale, dtype=gradient.dtype, device=gradient.device).reshape(-1, 1, 1, 1)


def log_p_gradient(classifier: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of log p(y | x_t) by x_t, unscaled; arguments as for `classifier_gradient`.

    The log probabilities are summed over the batch before differentiating, so each row gets the gradient of its own
    image. Works in inference mode too, because the arguments are copied outside it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_(True)
        log_p = F.log_softmax(classifier(x, t.clone()), dim=-1)
        chosen = log_p[torch.arange(len(y), device=y.device), y.clone()]
        (gradient,) = torch.autograd.grad(chosen.sum(), x)
    return gradient


def _map_head(channels: int, config: ClassifierConfig) -> nn.Sequential:
    norm = nn.GroupNorm(config.norm_groups, channels)
    if config.num_head_channels is not None and config.pool == "attention":
        stride = 1 << (len(config.channel_mult) - 1)
        positions = (config.image_height // stride) * (config.image_width // stride)
        pool = AttentionPool(channels, positions, config.num_head_channels, config.num_classes)
        return nn.Sequential(norm, nn.SiLU(), pool)
    last = nn.Conv2d(channels, config.num_classes, 1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(norm, nn.SiLU(), nn.AdaptiveAvgPool2d(1), last, nn.Flatten())


def _features_head(features: int, config: ClassifierConfig) -> nn.Sequential:
    first, last = RowLinear(features, SPATIAL_HIDDEN), RowLinear(SPATIAL_HIDDEN, config.num_classes)
    if config.pool == "spatial":
        return nn.Sequential(first, nn.ReLU(), last)
    return nn.Sequential(first, nn.GroupNorm(config.norm_groups, SPATIAL_HIDDEN), nn.SiLU(), last)
