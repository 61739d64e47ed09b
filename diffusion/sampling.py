"""Sample images in this process: the reference that the service's engine must match pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from diffusion.config import DiffusionConfig, ModelConfig
from diffusion.guidance import classifier_free, scaled_gradient
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_JUMP, STREAM_KEPT, STREAM_STEP, STREAM_X_T, normal
from diffusion.plans import SamplingPlan
from diffusion.respacing import IntArray, respace
from diffusion.update import Gradient, Network, Step, sample_loop, to_uint8


class ClassNetwork(Protocol):
    """A network to sample from: a `UNet` in eval mode, or an object with these members."""

    config: ModelConfig

    def embed_timesteps(self, t: Any, /) -> Any:
        """Return emb_t for the timestep inputs t, float32 [B]."""
        ...

    def run(self, inputs: NetworkInputs[Any], /) -> Any:
        """Return the raw output, [B, C or 2C, H, W]."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class NetworkEnsemble:
    """Several networks of one process, each used at some timesteps (IDDPM, appendix D)."""

    members: Sequence[ClassNetwork]
    network_of: IntArray
    """int64 [T]: index of the member of each training timestep."""
    diffusion: DiffusionConfig

    @property
    def config(self) -> ModelConfig:
        """Return the configuration of the first member; image shape and classes are those of every member."""
        return self.members[0].config


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """The inputs that determine one image, besides the network and the plan."""

    seed: int
    """0..2^53-1."""
    image_index: int = 0
    """Index of the image among those of its seed, 0..2^32-1."""
    class_index: int | None = None
    """Label; None for an unconditional model, or for the null class."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; 1 = off."""
    classifier_scale: float = 0.0
    """Classifier guidance; 0 = off."""
    given: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    """Image or latent [C, H, W] that the plan begins with, or of which `mask` keeps some pixels."""
    cond: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    """Conditioning image [C', H, W], for a model that takes one."""
    mask: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    """1 where pixels are made, 0 where those of `given` are kept, [1 or C, H, W]; None: all are made."""


class ClassGradient(Protocol):
    """A noisy classifier's gradient, see `diffusion.classifier.log_p_gradient`."""

    def embed_timesteps(self, t: Any, /) -> Any:
        """Return emb_t for the timestep inputs t, float32 [B]."""
        ...

    def __call__(self, inputs: NetworkInputs[Any], /) -> Any:
        """Return the gradient of log p(y | x_t) by x_t, [B, C, H, W]."""
        ...


def sample_images(
    network: ClassNetwork | NetworkEnsemble,
    plan: SamplingPlan,
    specs: list[ImageSpec],
    on_step: Callable[[int, Step[Any]], None] | None = None,
    *,
    gradient: ClassGradient | None = None,
    xp: Any = torch,
    device: Any = "cpu",
) -> npt.NDArray[np.uint8]:
    """Sample images that share a plan in one batch; a single spec gives the reference pixels for that image.

    The pixels equal the service's if the network's output for a row is bit-identical at every batch size of two or
    more. The service checks this at start-up; this function does not.

    Args:
        network: in eval mode, or an ensemble of such networks.
        plan: the chain.
        specs: at least one.
        on_step: called after each step with its index and its result.
        gradient: of the classifier, if a spec has a classifier_scale.
        xp: the array library of the network's inputs: `torch` or `numpy`.
        device: the device of the network's inputs.

    Returns:
        uint8 [N, H, W, C]; an image that overflowed is black.
    """
    return to_uint8(sample_values(network, plan, specs, on_step, gradient=gradient, xp=xp, device=device))


def sample_values(
    network: ClassNetwork | NetworkEnsemble,
    plan: SamplingPlan,
    specs: list[ImageSpec],
    on_step: Callable[[int, Step[Any]], None] | None = None,
    *,
    gradient: ClassGradient | None = None,
    xp: Any = torch,
    device: Any = "cpu",
) -> Any:
    """Return what `sample_images` converts to pixels: images, latents or predictions, float32 [N, C, H, W]."""
    count = len(specs)
    if count == 1:
        specs = specs * 2  # a CPU's convolutions may round a batch of one differently
    config = network.config
    shape = config.image_shape
    seeds = xp.asarray([spec.seed for spec in specs], dtype=xp.int64, device=device)
    indices = xp.asarray([spec.image_index for spec in specs], dtype=xp.int64, device=device)

    def noise(step: int, stream: int) -> Any:
        return normal(seeds, indices, xp.full_like(seeds, step), stream, shape)

    def stacked(arrays: list[npt.NDArray[np.float32] | None], absent: float) -> Any:
        rows = [np.broadcast_to(np.float32(absent) if array is None else array, shape) for array in arrays]
        return xp.asarray(np.stack(rows), device=device)

    x = sample_loop(
        _bound(network, specs, xp, device),
        plan,
        noise(0, STREAM_X_T),
        lambda step: noise(step, STREAM_STEP),
        gradient=None if gradient is None else _guiding(gradient, specs, xp, device),
        on_step=on_step,
        given=None if all(spec.given is None for spec in specs) else stacked([spec.given for spec in specs], 0.0),
        mask=None if all(spec.mask is None for spec in specs) else stacked([spec.mask for spec in specs], 1.0),
        kept_noise=lambda step: noise(step, STREAM_KEPT),
        jump_noise=lambda step: noise(step, STREAM_JUMP),
    )
    return x[:count]


def _guiding(gradient: ClassGradient, specs: list[ImageSpec], xp: Any, device: Any) -> Gradient[Any]:
    """Bind the classes and scales of a batch to a classifier's gradient, for `sample_loop`."""
    y = xp.asarray([spec.class_index or 0 for spec in specs], dtype=xp.int64, device=device)
    scales = xp.asarray([spec.classifier_scale for spec in specs], dtype=xp.float32, device=device)

    def guide(x_t: Any, t: Any) -> Any:
        return scaled_gradient(gradient(NetworkInputs(x_t, gradient.embed_timesteps(t), y)), scales)

    return guide


def guided_network(network: ClassNetwork, specs: list[ImageSpec], xp: Any = torch, device: Any = "cpu") -> Network[Any]:
    """Bind the classes and guidance scales of a batch to a network, for `sample_loop`."""
    config = network.config
    conds = [spec.cond for spec in specs if spec.cond is not None]
    cond = xp.asarray(np.stack(conds), device=device) if conds else None
    if config.num_classes is None:
        return lambda x_t, t: network.run(NetworkInputs(x_t, network.embed_timesteps(t), None, cond))
    labels = [config.num_classes if spec.class_index is None else spec.class_index for spec in specs]
    y = xp.asarray(labels, dtype=xp.int64, device=device)
    if all(spec.cfg_scale == 1 for spec in specs):
        return lambda x_t, t: network.run(NetworkInputs(x_t, network.embed_timesteps(t), y, cond))
    scales = xp.asarray([spec.cfg_scale for spec in specs], dtype=xp.float32, device=device)
    null = xp.full_like(y, config.num_classes)

    def guided(x_t: Any, t: Any) -> Any:
        inputs = NetworkInputs(x_t, network.embed_timesteps(t), y, cond)
        conditional, unconditional = network.run(inputs), network.run(inputs._replace(y=null))
        return classifier_free(unconditional, conditional, scales, config.image_channels)

    return guided


def _bound(network: ClassNetwork | NetworkEnsemble, specs: list[ImageSpec], xp: Any, device: Any) -> Network[Any]:
    if not isinstance(network, NetworkEnsemble):
        return guided_network(network, specs, xp, device)
    members = [guided_network(member, specs, xp, device) for member in network.members]
    t_model, network_of = respace(network.diffusion).t_model, network.network_of

    def call(x_t: Any, t: Any) -> Any:
        return members[network_of[np.searchsorted(t_model, float(t[0]))]](x_t, t)  # all rows are at one timestep

    return call
