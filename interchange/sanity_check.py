"""Check imported weights: does the network predict what its configuration says? Cheap, and needs no images.

Several flags do not change the shape of any weight, so weights load with a wrong flag and sample noise. The check uses
what every trained network can predict: at the last timestep x_T is eps, and shortly before it (alphas_cumprod 0.02, a
grey image) x_t is eps up to a scale, which must match the timestep input. A well-trained network predicts that eps
almost perfectly; with wrong timestep inputs, or another layout of its attention heads, it does not. The errors are
compared with a limit, and with the errors under other flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from diffusion.config import CheckpointConfig, DiffusionConfig
from diffusion.respacing import respace
from diffusion.unet import UNet
from diffusion.update import split_output
from interchange.sanity_words import words_for

MAX_EPS_ERROR = 0.1
"""Mean squared error of eps at t = T - 1 above which a network fails; predicting zeros scores 1.

Measured with the right flags: 0.02 on networks trained for 500 steps, 0.002 on one trained on 60,000 images. With wrong
heads or attention order: 0.04 to 0.1 on networks that use their attention. With shuffled weights: 1.0 to 1.7.
"""

SMALL_EPS_ERROR = 0.02
"""Mean squared error of eps at both noise levels up to which a preset's flags are not compared with others.

Smaller than any measured with wrong heads or attention order.
"""

MAX_X0_ERROR = 0.3
"""The limit for networks that predict x0, at alphas_cumprod 0.5 with plain images; also in units of eps.

At t = T - 1 a prediction of x0 cannot be checked: any x0 gives eps = x_T. Zeros score 0.5, eps taken for x0 scores 1.5;
the trained networks used for testing the check (which predict eps) score 0.03 to 0.13.
"""

CLEARLY_BETTER = 0.5
"""Ratio of errors (geometric mean) below which other flags are reported as the right ones.

Measured with the right flags: 0.89 or more for every other flag. With a wrong schedule: 0.38, wrong rescaling: 0.1,
wrong heads: 0.2.
"""

NOISY_ABAR = 0.02
MIDDLE_ABAR = 0.5
PLAIN_BRIGHTNESS = 0.7
CHECKED_PIXELS = 8192
"""Pixels per noise level; small images come in batches of up to 4."""


@dataclass(frozen=True)
class SanityReport:
    """The result of the check."""

    eps_error: float | None
    """Mean squared error of the predicted eps, whose variance is 1; None: not checked."""
    passed: bool
    """Whether the error is within the limit, and no other flags give a much smaller one."""
    advice: str
    """The result in words; if it failed, with the cure."""


def check_predictions(config: CheckpointConfig, weights: Mapping[str, Tensor]) -> SanityReport:
    """Check that a network predicts the eps (or x0) of its process, with noise from a fixed seed.

    The check takes about ten network calls on one to four images per noise level; one call if the flags are those of
    a preset and the errors are small, because other flags are then not tried. It detects untrained or damaged
    weights, a wrong prediction type and, on networks that depend on them, wrong heads, attention order, rescaling, T or
    noise schedule. It cannot detect flags that a network hardly depends on (heads of a small network, timesteps after a
    short training), a wrong T with rescale_timesteps True (the timestep inputs are the same), a wrong fixed variance,
    or wrong labels. Networks that predict x0 are compared with the limit only.

    Args:
        config: model and process.
        weights: the network's state dict, float32 on the CPU; must fit the configuration.

    Returns:
        The report.
    """
    if config.diffusion.prediction == "x0":
        return _check_x0(config, weights)
    steps = (_nearest_step(config.diffusion, NOISY_ABAR), config.diffusion.num_timesteps - 1)
    x_t, eps = _noisy_images(config, steps, brightness=0.0)
    errors = _eps_errors(config, weights, x_t, eps)

    at_last = float(errors[-1])
    what = f"mean squared error of eps, whose variance is 1: {_in_words(errors)}"
    passed = SanityReport(at_last, True, f"{what} (limit {MAX_EPS_ERROR})")
    if "preset" in config.provenance and bool((errors <= SMALL_EPS_ERROR).all()):
        return passed  # the flags are published, and on large images the calls with other flags take many minutes
    flags, better = _best_alternative(config, weights, x_t, eps, errors)
    if _ratio(better, errors) < CLEARLY_BETTER:
        return SanityReport(at_last, False, f"{what}. With {flags}: {_in_words(better)}. {words_for(config).cure}")
    if not at_last <= MAX_EPS_ERROR:
        return SanityReport(at_last, False, f"{what}, more than {MAX_EPS_ERROR}. {_suspects(config)}")
    return passed


def _suspects(config: CheckpointConfig) -> str:
    words = words_for(config)
    return (
        "Either the weights are untrained or damaged, or a field that does not change the shapes of weights is wrong: "
        f"{words.invisible}. {words.cure}"
    )


def _in_words(errors: Tensor) -> str:
    return f"{errors[0]:.2g} at alphas_cumprod {NOISY_ABAR}, {errors[1]:.2g} at t = T - 1"


def _ratio(errors: Tensor, reference: Tensor) -> float:
    return float((errors / reference).log().mean().exp())


def _check_x0(config: CheckpointConfig, weights: Mapping[str, Tensor]) -> SanityReport:
    step = _nearest_step(config.diffusion, MIDDLE_ABAR)
    x_t, eps = _noisy_images(config, (step,), brightness=PLAIN_BRIGHTNESS)
    process = respace(config.diffusion)
    abar = float(process.schedule.alphas_cumprod[step])
    out = run_network(config, weights, x_t, [float(process.t_model[step])], brightness=PLAIN_BRIGHTNESS)
    implied_eps = (x_t - abar**0.5 * out) / (1 - abar) ** 0.5
    error, as_eps = float(((implied_eps - eps) ** 2).mean()), float(((out - eps) ** 2).mean())
    what = f"mean squared error of x0 at alphas_cumprod {MIDDLE_ABAR}, in units of eps: {error:.2g}"
    if error <= MAX_X0_ERROR:
        return SanityReport(error, True, f"{what} (limit {MAX_X0_ERROR})")
    if as_eps <= MAX_X0_ERROR:
        return SanityReport(error, False, f"{what}; with {words_for(config).eps_prediction} it would be {as_eps:.2g}")
    return SanityReport(error, False, f"{what}, more than {MAX_X0_ERROR}. {_suspects(config)}")


def _nearest_step(diffusion: DiffusionConfig, abar: float) -> int:
    return int(np.abs(respace(diffusion).schedule.alphas_cumprod - abar).argmin())


def _timestep_inputs(diffusion: DiffusionConfig) -> list[float]:
    """Return the network's timestep inputs at the two noise levels of the check."""
    t_model = respace(diffusion).t_model
    return [float(t_model[_nearest_step(diffusion, NOISY_ABAR)]), float(t_model[-1])]


def _noisy_images(config: CheckpointConfig, steps: tuple[int, ...], brightness: float) -> tuple[Tensor, Tensor]:
    """Return noisy plain images x_t at the given timesteps, and their eps; each [len(steps) * n, C, H, W]."""
    channels, height, width = config.model.image_shape
    count = max(1, min(4, CHECKED_PIXELS // (height * width)))
    eps = torch.randn(len(steps) * count, channels, height, width, generator=torch.Generator().manual_seed(0))
    process = respace(config.diffusion)
    abar = torch.from_numpy(process.schedule.alphas_cumprod[list(steps)]).repeat_interleave(count)[:, None, None, None]
    x0 = _plain_images(len(eps), brightness)
    return (abar.sqrt() * x0).float() + (1 - abar).sqrt().float() * eps, eps


def _plain_images(rows: int, brightness: float) -> Tensor:
    """Return images of one colour, alternately bright and dark: [rows, 1, 1, 1]."""
    return torch.tensor([brightness, -brightness]).repeat(rows)[:rows, None, None, None]


def run_network(
    config: CheckpointConfig, weights: Mapping[str, Tensor], x_t: Tensor, t_model: list[float], brightness: float = 0.0
) -> Tensor:
    """Return a network's prediction for x_t; each timestep input in t_model gets an equal share of the rows."""
    model = config.model
    with torch.device("meta"):
        network = UNet(model)
    network.load_state_dict(dict(weights), strict=True, assign=True)
    rows = len(x_t)
    t = torch.tensor(t_model).repeat_interleave(rows // len(t_model))
    y = None if model.num_classes is None else torch.arange(rows) % model.num_classes
    cond = None
    if model.cond_shape is not None:
        cond = _plain_images(rows, brightness).expand(-1, *model.cond_shape)
    with torch.inference_mode():
        return split_output(network.eval()(x_t, t, y, cond), model.image_channels)[0]


def _eps_errors(config: CheckpointConfig, weights: Mapping[str, Tensor], x_t: Tensor, eps: Tensor) -> Tensor:
    """Return the mean squared error of eps at each of the two noise levels."""
    squared = (run_network(config, weights, x_t, _timestep_inputs(config.diffusion)) - eps) ** 2
    return squared.reshape(2, -1).mean(dim=1)


def _best_alternative(
    config: CheckpointConfig, weights: Mapping[str, Tensor], x_t: Tensor, eps: Tensor, errors: Tensor
) -> tuple[str, Tensor]:
    """Return the description and the errors of the flags with the smallest errors; these flags if none are better."""
    same = _behaviour(config)
    names: dict[tuple[Any, ...], list[str]] = {}
    configs: dict[tuple[Any, ...], CheckpointConfig] = {}
    words = words_for(config)
    for changes, alternative in _alternatives(config):
        behaviour = _behaviour(alternative)
        if behaviour != same:
            names.setdefault(behaviour, []).append(words.describe(changes, config.model))
            configs.setdefault(behaviour, alternative)

    best = ("these flags", errors)
    for behaviour, alternative in configs.items():
        found = _eps_errors(alternative, weights, x_t, eps)
        if _ratio(found, best[1]) < 1:
            best = (" or ".join(names[behaviour]), found)
    return best


def _behaviour(config: CheckpointConfig) -> tuple[Any, ...]:
    """Return a key of what the network computes in the check; configurations with equal keys give equal errors."""
    model = config.model
    channels = [
        c for c, s in zip(model.level_channels, model.level_sizes, strict=True) if s in model.attention_resolutions
    ]
    encoder = [model.heads_for(c) for c in [*channels, model.level_channels[-1]]]
    decoder = [model.heads_for(c, model.num_heads_upsample) for c in channels]
    order = model.attention_order if max(encoder + decoder) > 1 else None  # with one head both are the same
    # Rounded: 999 of T = 1000 is 999.75 of T = 4000, rescaled
    inputs = (round(t, -1) for t in _timestep_inputs(config.diffusion))
    return (tuple(encoder), tuple(decoder), order, *inputs)


def _alternatives(config: CheckpointConfig) -> Iterator[tuple[dict[str, Any], CheckpointConfig]]:
    """Yield changes of flags that keep the shapes of weights, and the changed configuration."""
    diffusion = config.diffusion
    schedule = "linear" if diffusion.noise_schedule == "cosine" else "cosine"
    rescaled = not diffusion.rescale_timesteps
    timesteps: list[dict[str, Any]] = [
        {"noise_schedule": schedule},
        {"rescale_timesteps": rescaled},
        {"noise_schedule": schedule, "rescale_timesteps": rescaled},
        {"num_timesteps": 1000},
        {"num_timesteps": 4000},
    ]
    for changes in timesteps:
        try:
            yield changes, config.replace(diffusion=diffusion.replace(**changes))
        except ValidationError:
            continue  # the chain is too short for a linear schedule

    heads: list[dict[str, Any]] = [
        {"attention_order": "legacy" if config.model.attention_order == "new" else "new"},
        *({"num_heads": n, "num_head_channels": None, "num_heads_upsample": None} for n in (1, 2, 4, 8)),
        *({"num_head_channels": n} for n in (32, 64)),
        *({"num_heads_upsample": n} for n in (1, 2, 4, 8)),
    ]
    for changes in heads:
        try:
            yield changes, config.replace(model=config.model.replace(**changes))
        except ValidationError:
            continue  # this number of heads does not divide the channels
