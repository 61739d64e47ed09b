"""Training losses: L_simple, the terms of the variational bound, and L_hybrid (IDDPM section 3.1).

Every loss is a mean over C*H*W per image. The terms of the bound are in bits/dim, as in OpenAI's released code, so
loss weights are comparable with theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from diffusion.config import DiffusionConfig
from diffusion.respacing import Process
from diffusion.schedules import FloatArray
from diffusion.update import split_output

LossType = Literal["simple", "hybrid", "vlb"]

LAMBDA = 0.001
"""Weight of L_vlb, the bound of the whole chain, in L_hybrid = L_simple + lambda L_vlb (IDDPM section 3.1)."""

NATS_PER_BIT = math.log(2.0)

MIN_PROBABILITY = 1e-12
"""Lower bound of the decoder's probabilities, which limits its negative log likelihood to 39.9 bits/dim."""


@dataclass(frozen=True, eq=False)
class LossTables:
    """The tables that training reads, each float32 [S], computed in float64; indexed by the timestep t.

    `Schedule` defines them.
    """

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    """Factor of x_t in x0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps."""
    sqrt_recipm1_alphas_cumprod: Tensor
    """Factor of -eps in the same equation."""
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_log_variance_clipped: Tensor
    """The lower end of learned_range, and the fixed_small log variance."""
    log_betas: Tensor
    """The upper end of learned_range."""
    fixed_large_log_variance: Tensor

    @classmethod
    def from_process(cls, process: Process, device: torch.device | str = "cpu") -> Self:
        """Compute the tables of a process and copy them to a device."""
        schedule = process.schedule
        abar = schedule.alphas_cumprod

        def table(values: FloatArray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).to(device)

        return cls(
            sqrt_alphas_cumprod=table(np.sqrt(abar)),
            sqrt_one_minus_alphas_cumprod=table(np.sqrt(1.0 - abar)),
            sqrt_recip_alphas_cumprod=table(np.sqrt(1.0 / abar)),
            sqrt_recipm1_alphas_cumprod=table(np.sqrt(1.0 / abar - 1.0)),
            posterior_mean_coef1=table(schedule.posterior_mean_coef1),
            posterior_mean_coef2=table(schedule.posterior_mean_coef2),
            posterior_log_variance_clipped=table(schedule.posterior_log_variance_clipped),
            log_betas=table(np.log(schedule.betas)),
            fixed_large_log_variance=table(np.log(schedule.fixed_large_variance)),
        )

    @property
    def num_steps(self) -> int:
        """S, steps of the process."""
        return len(self.log_betas)


class TrainingLosses(NamedTuple):
    """The losses of one training batch, per image."""

    loss: Tensor
    """[B]: the loss to minimise, before the timestep sampler's weights."""
    mse: Tensor
    """[B]: L_simple, always computed."""
    vb_bpd: Tensor
    """[B]: L_t in bits/dim, unweighted; zeros if the variance is not learned and the loss is not `vlb`."""


def q_sample(tables: LossTables, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Noise images to timestep t: a draw of q(x_t | x_0) (Ho et al. 2020, arXiv:2006.11239, Equation 4).

    Args:
        tables: of the process.
        x0: images [B, C, H, W] in [-1, 1].
        t: int64 [B], 0..S-1.
        noise: standard normal, shaped like x0.

    Returns:
        x_t, shaped like x0.
    """
    return _rows(tables.sqrt_alphas_cumprod, t) * x0 + _rows(tables.sqrt_one_minus_alphas_cumprod, t) * noise


def q_posterior_mean(tables: LossTables, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the mean of q(x_{t-1} | x_t, x_0) (IDDPM, Equation 11), shaped like x_t; t is int64 [B]."""
    return _rows(tables.posterior_mean_coef1, t) * x0 + _rows(tables.posterior_mean_coef2, t) * x_t


def p_log_variance(tables: LossTables, diffusion: DiffusionConfig, var_values: Tensor, t: Tensor) -> Tensor:
    """Return the log variance of p(x_{t-1} | x_t), shaped like var_values (IDDPM, Equation 15).

    Args:
        tables: of the process.
        diffusion: its field `variance` selects the kind of variance.
        var_values: the network's raw variance output [B, C, H, W]; only its shape is used for fixed variances.
        t: int64 [B].
    """
    small = _rows(tables.posterior_log_variance_clipped, t)
    if diffusion.variance == "learned_range":
        fraction = (var_values + 1) / 2
        return fraction * _rows(tables.log_betas, t) + (1 - fraction) * small
    if diffusion.variance == "learned":
        return var_values
    fixed = small if diffusion.variance == "fixed_small" else _rows(tables.fixed_large_log_variance, t)
    return fixed.expand_as(var_values)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) per element, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability of 8-bit pixels under a Gaussian (Ho et al. 2020, Equation 13), in nats.

    A pixel's probability is the Gaussian's mass within 1/255 of it; the bins of the lowest and the highest value are
    open-ended. The normal CDF is the tanh approximation, which the released models were trained and evaluated with.

    Args:
        x0: pixels as v / 127.5 - 1 with v in 0..255.
        mean: shaped like x0.
        log_variance: shaped like x0.

    Returns:
        Log probabilities, shaped like x0, each at least log(1e-12).
    """
    centered = x0 - mean
    inverse_deviation = torch.exp(-0.5 * log_variance)
    below_upper = _normal_cdf(inverse_deviation * (centered + 1.0 / 255.0))
    below_lower = _normal_cdf(inverse_deviation * (centered - 1.0 / 255.0))
    probability = torch.where(
        x0 < -0.999,
        below_upper,
        torch.where(x0 > 0.999, 1.0 - below_lower, below_upper - below_lower),
    )
    return probability.clamp(min=MIN_PROBABILITY).log()


def predict_x0(
    tables: LossTables, diffusion: DiffusionConfig, prediction: Tensor, x_t: Tensor, t: Tensor, *, clip: bool = False
) -> Tensor:
    """Return the x0 that a network's eps (or x0) [B, C, H, W] predicts at x_t; t is int64 [B].

    Training does not clip it; sampling and the evaluation of likelihoods clip it to [-1, 1].
    """
    if diffusion.prediction == "eps":
        x0_scale, eps_scale = tables.sqrt_recip_alphas_cumprod, tables.sqrt_recipm1_alphas_cumprod
        prediction = _rows(x0_scale, t) * x_t - _rows(eps_scale, t) * prediction
    return prediction.clamp(-1.0, 1.0) if clip else prediction


def vb_term_bpd(
    tables: LossTables,
    diffusion: DiffusionConfig,
    pred_x0: Tensor,
    var_values: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
) -> Tensor:
    """Return L_t of the variational bound (IDDPM, Equations 4 to 6; t = 0 is the decoder), in bits/dim [B].

    Args:
        tables: of the process.
        diffusion: selects the kind of variance.
        pred_x0: the predicted x0 [B, C, H, W], from `predict_x0`.
        var_values: the network's raw variance output, shaped like pred_x0; zeros if the network has none.
        x0: the images [B, C, H, W].
        x_t: the noised images [B, C, H, W].
        t: int64 [B].
    """
    mean = q_posterior_mean(tables, pred_x0, x_t, t)
    log_variance = p_log_variance(tables, diffusion, var_values, t)

    true_mean = q_posterior_mean(tables, x0, x_t, t)
    true_log_variance = _rows(tables.posterior_log_variance_clipped, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    decoder_nll = -discretized_gaussian_log_likelihood(x0, mean, log_variance)
    return torch.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / NATS_PER_BIT


def training_losses(
    tables: LossTables,
    diffusion: DiffusionConfig,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    loss: LossType,
    rescale: bool,
    min_snr_gamma: float | None = None,
) -> TrainingLosses:
    """Compute the loss of one training batch from the network's output.

    | loss   | rescale | minimises            | OpenAI's name         |
    |--------|---------|----------------------|-----------------------|
    | simple | either  | mse                  | MSE, fixed variance   |
    | hybrid | False   | mse + L_t            | MSE, learned variance |
    | hybrid | True    | mse + lambda * S L_t | RESCALED_MSE          |
    | vlb    | False   | L_t                  | KL                    |
    | vlb    | True    | S L_t                | RESCALED_KL           |

    With t drawn uniformly, S L_t estimates L_vlb, so `hybrid` with rescale is L_hybrid of IDDPM's Equation 16 with
    lambda = 0.001. In both hybrids the bound trains the variance only: its gradient stops at the prediction
    (section 3.1).

    Args:
        tables: of the training process, S steps.
        diffusion: selects what the network predicts and the kind of variance.
        model_output: the network's raw output at x_t [B, C, H, W], or [B, 2C, H, W] with var_values.
        x0: the images [B, C, H, W] in [-1, 1].
        x_t: the noised images, from `q_sample`.
        noise: the noise that x_t was made with, shaped like x0.
        t: int64 [B], 0..S-1.
        loss: the loss to minimise, see the table.
        rescale: whether L_t is scaled to the whole chain, see the table.
        min_snr_gamma: weight mse by `min_snr_weights` in `simple` and `hybrid`; None: weight 1.

    Raises:
        ValueError: `hybrid` without a learned variance, where the bound has nothing to train; an output whose
            channels do not fit diffusion.variance.
    """
    channels = x0.shape[1]
    wanted = 2 * channels if diffusion.learns_variance else channels
    if model_output.shape[1] != wanted:
        raise ValueError(
            f"model_output must have {wanted} channels for diffusion.variance '{diffusion.variance}' and images of "
            f"{channels} channels; got {model_output.shape[1]}"
        )
    if loss == "hybrid" and not diffusion.learns_variance:
        raise ValueError(f"loss 'hybrid' needs a learned variance; diffusion.variance is '{diffusion.variance}'")

    prediction, var_values = split_output(model_output, channels)
    target = noise if diffusion.prediction == "eps" else x0
    mse = mean_flat((target - prediction) ** 2)

    if loss == "vlb":
        pred_x0 = predict_x0(tables, diffusion, prediction, x_t, t)
        vb_bpd = vb_term_bpd(tables, diffusion, pred_x0, var_values, x0, x_t, t)
        return TrainingLosses(vb_bpd * tables.num_steps if rescale else vb_bpd, mse, vb_bpd)
    weighted = mse if min_snr_gamma is None else mse * min_snr_weights(tables, diffusion, t, min_snr_gamma)
    if not diffusion.learns_variance:
        return TrainingLosses(weighted, mse, torch.zeros_like(mse))
    pred_x0 = predict_x0(tables, diffusion, prediction.detach(), x_t, t)
    vb_bpd = vb_term_bpd(tables, diffusion, pred_x0, var_values, x0, x_t, t)
    if loss == "simple":
        return TrainingLosses(weighted, mse, vb_bpd)
    weight = LAMBDA * tables.num_steps if rescale else 1.0
    return TrainingLosses(weighted + weight * vb_bpd, mse, vb_bpd)


def min_snr_weights(tables: LossTables, diffusion: DiffusionConfig, t: Tensor, gamma: float) -> Tensor:
    """Return weights [B] of the mean squared error at timesteps [B] (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    min(SNR, gamma) for a network that predicts x0, min(SNR, gamma) / SNR for one that predicts eps, where
    SNR = abar / (1 - abar).
    """
    snr = (tables.sqrt_alphas_cumprod[t] / tables.sqrt_one_minus_alphas_cumprod[t]) ** 2
    weights = snr.clamp(max=gamma)
    return weights / snr if diffusion.prediction == "eps" else weights


def _rows(table: Tensor, t: Tensor) -> Tensor:
    return table[t][:, None, None, None]


def mean_flat(x: Tensor) -> Tensor:
    """Return the mean of each row over C*H*W, [B]."""
    return x.flatten(1).mean(dim=1)


def _normal_cdf(z: Tensor) -> Tensor:
    # The same approximation as in GELU (arXiv:1606.08415, section 2).
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))
