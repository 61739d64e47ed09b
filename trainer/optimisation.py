"""Optimisation: the gradient of a batch, and the optimiser's step."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from diffusion.unet import EmbedSequential
from trainer.batches import Batch, seed_dropout
from trainer.config import TrainConfig
from trainer.objective import Network, Objective
from trainer.ranks import Ranks


class Optimisation:
    """A network with its optimiser, its precision and its part of each batch's gradient.

    Nothing here waits for the device.
    """

    def __init__(self, config: TrainConfig, objective: Objective, network: nn.Module, ranks: Ranks) -> None:
        self._config = config
        self._objective = objective
        self.device = ranks.device
        self._ranks = ranks
        if config.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # keywords only
        if config.use_checkpoint:
            for module in network.modules():
                if isinstance(module, EmbedSequential):
                    module.recompute = True
        self._wrapped = ranks.wrap(network)
        if config.compile:
            self._wrapped.compile()
        self.precision = precision_of(config, ranks.device)
        self._dtype = torch.float16 if self.precision == "float16" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.precision == "float16")
        self.network = network
        self._parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=True,  # a quarter of the time; gradients and values must have the strides of their weights
        )
        self.rows_at_once = config.microbatch_size or config.batch_size // ranks.world
        """Images of a network call in this process."""
        measures = config.timestep_sampler != "stratified" and not self.scaler.is_enabled()
        self.micro_batch = (
            self.rows_at_once if measures and self.rows_at_once < config.batch_size // ranks.world else None
        )
        """Images of a micro-batch, whose gradient has noise that says something about that of the batch.

        None: the batch is one micro-batch; its timesteps are not independent (`stratified`); or float16 scales them.
        """
        self.micro_norm: Tensor | None = None
        """Norm of the gradient of the first micro-batch of this process, on the device; None without `micro_batch`."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch's first micro-batch, [B] each, without exchange between processes."""
        return self._objective.losses(self.autocast(self.network), batch.rows(slice(0, self.rows_at_once)))

    def gradient(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the gradient of the weighted mean loss over the batches of all processes.

        Args:
            batch: of this process.

        Returns:
            The losses of this process's batch, [B] each, detached, on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(batch), self.rows_at_once):
            part = batch.rows(slice(start, start + self.rows_at_once))
            seed_dropout(self._config.seed, part)
            if start + self.rows_at_once < len(batch):
                with self._ranks.no_sync(self._wrapped):
                    losses = self._backward(part, len(batch))
            else:
                losses = self._backward(part, len(batch))
            parts.append({name: loss.detach() for name, loss in losses.items()})
            if start == 0 and self.micro_batch is not None:
                self.micro_norm = self._norm() * (len(batch) / self.micro_batch)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def step(self, lr: float) -> Tensor:
        """Clip the gradient, take a step, and return the gradient's norm before clipping, on the device.

        In float16 a step whose gradient overflows is skipped, and the next one scales the loss less.
        """
        self.scaler.unscale_(self.optimizer)
        grad_norm = self._norm()
        if self._config.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._config.grad_clip, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    def _norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _backward(self, part: Batch, batch_size: int) -> dict[str, Tensor]:
        losses = self._objective.losses(self.autocast(self._wrapped), part)
        mean = (losses["loss"] * part.weights).sum() / batch_size
        self.scaler.scale(mean).backward()  # type: ignore[no-untyped-call]
        return losses

    def autocast(self, network: nn.Module) -> Network:
        """Return a network that computes in the precision of the run."""

        def run(*inputs: Tensor | None, **conditions: Tensor) -> Tensor:
            low = self.precision != "float32"
            with torch.autocast(self.device.type, self._dtype) if low else nullcontext():
                output: Tensor = network(*inputs, **conditions)
            return output

        return run


def precision_of(config: TrainConfig, device: torch.device) -> str:
    """Return the precision of autocast: `auto` is bfloat16 if the machine supports it, else float32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported()
    else:
        supported = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return "bfloat16" if supported else "float32"


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Return the learning rate of the next step after a number of images."""
    warmup = min(1.0, (images_seen + config.batch_size) / max(1, config.lr_warmup_images))
    progress = (images_seen - config.lr_warmup_images) / max(1, config.total_images - config.lr_warmup_images)
    progress = min(1.0, max(0.0, progress))
    match config.lr_schedule:
        case "constant":
            decay = 1.0
        case "linear":
            decay = 1 - progress
        case "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * progress))
        case "inverse_sqrt":
            decay = math.sqrt(config.lr_decay_images / max(config.lr_decay_images, images_seen))
    return config.lr * warmup * decay
