"""Measure the error of an exported graph against PyTorch in float32: network calls by timestep, and final pixels.

The reference is the original network. A UNet's calls are compared at the inputs of a reference chain, so that images
at every timestep have the right noise level; a classifier's calls are compared at unit noise for every timestep.
Errors of calls have a limit in every precision. Pixel differences have a limit in float32 only and are otherwise
reported (an ancestral chain in lower precision gives another, equally good sample).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusion.classifier import Classifier, classifier_gradient
from diffusion.conditioning import enlarged
from diffusion.config import CheckpointConfig, ClassifierConfig, DiffusionConfig, ModelConfig
from diffusion.noise import STREAM_STEP, STREAM_X_T, normal
from diffusion.plans import build_plan
from diffusion.respacing import respace
from diffusion.time_mlp import TimeMLP
from diffusion.unet import UNet
from diffusion.update import sample_loop, to_uint8
from formats.artifact import BandError, ChainParity, NetworkParity
from formats.checkpoint_config import AnyCheckpointConfig
from formats.precision import Precision
from model_export.runtimes import Arrays, Graph, Runtime

STEPS = 50
"""Sampling steps of a chain, if the network is not too large."""
ROWS = 4
"""Images in a chain, if the network is not too large."""
LEAST_STEPS = 10
"""Sampling steps of a chain of the largest networks: two in each band."""
CHAIN_FLOPS = 2e13
"""Floating-point operations that a chain may take: some minutes on two cores. Each runtime repeats it twice."""
BANDS = 5
"""Number of bands of timesteps, of equal width."""
LIMITS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Maximum relative error of a network call in any band: about 50 times the measured one in float32, else 5 times."""
PIXEL_LIMIT = 1e-3
"""Maximum fraction of 8-bit values that may differ by more than 2 levels after a float32 chain."""

NO_NUMBER = sys.float_info.max
"""Error reported for a graph that overflows: above every limit and, unlike NaN, representable in JSON."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Call:
    """One network call of the reference."""

    t: float
    """Timesteps passed to the network."""
    inputs: Arrays
    """Inputs of the graph, with emb_t computed by the artifact's time MLP."""
    expected: FloatArray


@dataclass(frozen=True)
class ChainSize:
    """The number of network calls of a reference."""

    steps: int
    images: int
    """Images per call."""


def chain_size(model: ModelConfig | ClassifierConfig, diffusion: DiffusionConfig) -> ChainSize:
    """Return the size of the chain by which a network is measured: with large networks fewer images, then fewer steps.

    It depends on the configuration only, so that every export of a checkpoint makes the same measurements.
    """
    calls = int(CHAIN_FLOPS / flops_of_call(model))
    steps = min(STEPS, max(calls, LEAST_STEPS), diffusion.num_timesteps)
    return ChainSize(steps, images=min(ROWS, max(calls // steps, 1)))


def flops_of_call(model: ModelConfig | ClassifierConfig) -> int:
    """Return the floating-point operations of a network call on one image; multiplications and additions count as two.

    Only matrix products and convolutions are counted.
    """
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        x_t, emb_t = torch.zeros(1, *model.image_shape), torch.zeros(1, model.emb_channels)
        if isinstance(model, ModelConfig):
            y = None if model.num_classes is None else torch.zeros(1, dtype=torch.int64)
            cond = None if model.cond_shape is None else torch.zeros(1, *model.cond_shape)
            UNet(model).eval().forward_emb(x_t, emb_t, y, cond)
        else:
            Classifier(model).eval().forward_emb(x_t, emb_t)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Reference:
    """A chain of the reference: its network calls and its pixels."""

    config: CheckpointConfig
    size: ChainSize
    calls: Sequence[Call]
    pixels: npt.NDArray[np.uint8]


def unet_reference(network: UNet, config: CheckpointConfig, time_mlp: TimeMLP) -> Reference:
    """Sample images with PyTorch, and record every network call."""
    size = chain_size(config.model, config.diffusion)
    conditions = _conditions(config, size.images)
    calls: list[Call] = []

    def run(x_t: Tensor, t: Tensor) -> Tensor:
        out = network(x_t, t, *(torch.from_numpy(conditions[k]) if k in conditions else None for k in ("y", "cond")))
        inputs = {"x_t": x_t.numpy().copy(), "emb_t": time_mlp(t.numpy()), **conditions}
        calls.append(Call(float(t[0]), inputs, out.numpy()))
        return out

    return Reference(config, size, calls, sample_chain(config, size, run, torch))


def classifier_calls(classifier: Classifier, diffusion: DiffusionConfig, time_mlp: TimeMLP) -> tuple[list[Call], ...]:
    """Classify unit noise at each timestep of a chain with PyTorch; return the calls for logits and for gradients."""
    size = chain_size(classifier.config, diffusion)
    t_model = respace(diffusion, str(size.steps)).t_model
    ids = np.arange(size.images)
    y = ids % classifier.config.num_classes
    logits, gradients = [], []
    for k, t in enumerate(t_model):
        x_t = torch.from_numpy(normal(ids, ids, np.full_like(ids, k), STREAM_X_T, classifier.config.image_shape))
        t_rows = np.full(size.images, t, dtype=np.float32)
        inputs = {"x_t": x_t.numpy(), "emb_t": time_mlp(t_rows)}
        with torch.no_grad():
            out = classifier(x_t, torch.from_numpy(t_rows))
        logits.append(Call(float(t), inputs, out.numpy()))
        gradient = classifier_gradient(classifier, x_t, torch.from_numpy(t_rows), torch.from_numpy(y), 1.0)
        gradients.append(Call(float(t), {**inputs, "y": y}, gradient.numpy()))
    return logits, gradients


def network_parity(
    graph: Graph,
    calls: Sequence[Call],
    config: AnyCheckpointConfig,
    runtime: Runtime,
    file: str,
) -> NetworkParity:
    """Compare a graph with the reference's calls, band by band."""
    split = config.model.image_channels if config.kind == "unet" and config.model.learn_sigma else None
    t_model = respace(config.diffusion).t_model
    count = min(BANDS, len(t_model))
    sums = np.zeros((count, 2, 2))  # per band: (squared difference, squared norm) of the two halves of the output
    met = np.zeros(count, dtype=np.bool_)
    edges = np.linspace(0, len(t_model), count + 1).astype(int)
    highest = t_model[edges[1:] - 1]
    for call in calls:
        band = min(int(np.searchsorted(highest, call.t)), count - 1)
        met[band] = True
        out = graph(call.inputs)
        halves: tuple[tuple[FloatArray, FloatArray], ...] = ((out, call.expected),)
        if split is not None:
            halves = ((out[:, :split], call.expected[:, :split]), (out[:, split:], call.expected[:, split:]))
        for half, (actual, expected) in enumerate(halves):
            difference = np.square(actual.astype(np.float64) - expected).sum()
            sums[band, half] += difference, np.square(expected.astype(np.float64)).sum()
    bands = [
        BandError(
            t_min=int(edges[band]),
            t_max=int(edges[band + 1]) - 1,
            prediction=_relative(sums[band, 0]),
            variance=None if split is None else _relative(sums[band, 1]),
        )
        for band in np.flatnonzero(met)
    ]
    return NetworkParity(
        backend=runtime.backend,
        precision=runtime.precision,
        file=file,
        limit=LIMITS[runtime.precision],
        bands=tuple(bands),
    )


def chain_parity(graph: Graph, reference: Reference, time_mlp: TimeMLP, runtime: Runtime) -> ChainParity:
    """Sample the reference's images with a graph, and compare pixels."""
    config, size = reference.config, reference.size
    conditions = _conditions(config, size.images)

    def run(x_t: FloatArray, t: FloatArray) -> FloatArray:
        return graph({"x_t": x_t, "emb_t": time_mlp(t), **conditions})

    pixels = sample_chain(config, size, run, np)
    difference = np.abs(pixels.astype(int) - reference.pixels)
    return ChainParity(
        backend=runtime.backend,
        precision=runtime.precision,
        steps=size.steps,
        images=size.images,
        beyond_1=float((difference > 1).mean()),
        beyond_2=float((difference > 2).mean()),
        beyond_4=float((difference > 4).mean()),
        limit=PIXEL_LIMIT if runtime.precision == "fp32" else None,
    )


def sample_chain(config: CheckpointConfig, size: ChainSize, network: Any, xp: Any) -> npt.NDArray[np.uint8]:
    """Return pixels [images, H, W, C] of a short ancestral chain with a network of (x_t, t), in a library of arrays."""
    ids = xp.arange(size.images)
    plan = build_plan(config.diffusion, "ancestral", str(size.steps))

    def noise(step: int, stream: int) -> Any:
        return normal(ids, ids, xp.full_like(ids, step), stream, config.model.image_shape)

    return to_uint8(sample_loop(network, plan, noise(0, STREAM_X_T), lambda step: noise(step, STREAM_STEP)))


def _conditions(config: CheckpointConfig, count: int) -> dict[str, npt.NDArray[Any]]:
    """Return the constant inputs of a chain: labels spread over all classes, random conditioning images."""
    model = config.model
    ids = np.arange(count)
    conditions: dict[str, npt.NDArray[Any]] = {}
    if model.num_classes is not None:
        conditions["y"] = np.linspace(0, model.num_labels - 1, count).astype(np.int64)
    shape = model.low_res_shape or model.cond_shape
    if shape is not None:
        images = np.clip(normal(ids, ids + count, ids * 0, STREAM_X_T, shape) / 2, -1, 1)
        conditions["cond"] = enlarged(images, model.image_height, model.image_width)
    return conditions


def _relative(sums: npt.NDArray[np.float64]) -> float:
    difference, norm = sums
    error = float(np.sqrt(difference / max(norm, 1e-30)))
    return error if math.isfinite(error) else NO_NUMBER
