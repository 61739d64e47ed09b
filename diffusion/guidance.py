"""Guidance towards a class: classifier-free, and by a classifier's gradient (`diffusion.classifier` computes it)."""

from __future__ import annotations

import numpy as np

from diffusion.arrays import A, namespace
from diffusion.update import split_output


@np.errstate(over="ignore", invalid="ignore")  # `advance` reports rows that are not finite
def classifier_free(out_uncond: A, out_cond: A, cfg_scale: A | float, channels: int) -> A:
    """Combine a network's outputs without and with the class: uncond + cfg_scale * (cond - uncond).

    Ho & Salimans 2022 (arXiv:2207.12598, Equation 6, whose w is cfg_scale - 1). Only the prediction is guided;
    var_values are taken from out_cond.

    Args:
        out_uncond: raw output for the null class, [B, C, H, W] or [B, 2C, H, W].
        out_cond: raw output for the class, shaped like out_uncond.
        cfg_scale: a number, or one per row [B]; 1 = off, bit-identical to out_cond; 0 = unconditional.
        channels: C, channels of the images.

    Returns:
        The guided output, shaped like out_cond.
    """
    xp = namespace(out_cond)
    scale = xp.reshape(xp.asarray(cfg_scale, dtype=out_cond.dtype, device=out_cond.device), (-1, 1, 1, 1))
    uncond, _ = split_output(out_uncond, channels)
    cond, _ = split_output(out_cond, channels)
    guided = xp.where(scale == 1, cond, uncond + scale * (cond - uncond))
    return xp.concat([guided, out_cond[:, channels:]], axis=1)


@np.errstate(over="ignore", invalid="ignore")  # `advance` reports rows that are not finite
def scaled_gradient(gradient: A, classifier_scale: A) -> A:
    """Multiply the gradient of log p(y | x_t), [B, C, H, W], by each row's classifier_scale, [B]."""
    return gradient * namespace(gradient).reshape(classifier_scale, (-1, 1, 1, 1))
