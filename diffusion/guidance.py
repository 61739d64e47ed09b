"""Guidance: towards a class by the model itself, or by a classifier of noisy images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.unet import split_output


def classifier_free(out_uncond: Tensor, out_cond: Tensor, cfg_scale: Tensor | float, channels: int) -> Tensor:
    """Combine a network's outputs without and with the class: uncond + cfg_scale * (cond - uncond).

    Ho & Salimans 2022 (arXiv:2207.12598, Equation 6, whose w is cfg_scale - 1). Only the prediction is guided;
    var_values are those with the class.

    Args:
        out_uncond: raw output for the null class, [B, C, H, W] or [B, 2C, H, W].
        out_cond: raw output for the class, shaped like out_uncond.
        cfg_scale: a number, or one per row [B]; 1 = off, which gives out_cond's very bits; 0 = without the class.
        channels: C, channels of the images.

    Returns:
        Shaped like out_cond.
    """
    scale = torch.as_tensor(cfg_scale, dtype=out_cond.dtype, device=out_cond.device).reshape(-1, 1, 1, 1)
    uncond, _ = split_output(out_uncond, channels)
    cond, _ = split_output(out_cond, channels)
    guided = torch.where(scale == 1, cond, uncond + scale * (cond - uncond))
    return torch.cat([guided, out_cond[:, channels:]], dim=1)


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    y: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """Return the gradient of log p(y | x_t) by x_t, times scale (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

    Summed over the batch before differentiating, so that each row has the gradient of its own image.

    Args:
        classifier: (x_t, t) -> logits [B, num_classes].
        x_t: noisy images [B, C, H, W].
        t: what the classifier is told of the timestep, [B]: the same as the network (`Process.model_t`).
        y: labels int64 [B].
        scale: classifier_scale, a number, or one per row [B]; 0 = off.

    Returns:
        Shaped like x_t, detached; works under torch.no_grad.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(True)
        log_p = F.log_softmax(classifier(x, t), dim=-1)
        chosen = log_p[torch.arange(len(y), device=y.device), y]
        (gradient,) = torch.autograd.grad(chosen.sum(), x)
    return gradient * torch.as_tensor(scale, dtype=gradient.dtype, device=gradient.device).reshape(-1, 1, 1, 1)
