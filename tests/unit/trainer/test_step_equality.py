"""A run equals an independent restatement of OpenAI's update rule, given the same batches and initial weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.unet import UNet
from formats.checkpoint import read_weights
from tests.counts import count
from tests.unit.trainer.test_resume import train, write_npz
from tests.unit.trainer.test_trainer import tiny
from trainer.batches import Batch, Batches
from trainer.config import TrainConfig
from trainer.data import open_dataset
from trainer.loop import resolve
from trainer.run_folder import LOG_FILE
from trainer.timestep_sampler import StratifiedSampler

STEPS = count(300, 10)
T = 40
LR, DECAY, EMA_RATE, BETA1, BETA2 = 1e-3, 0.01, 0.99, 0.9, 0.999


def hybrid_loss(network: UNet, batch: Batch) -> Tensor:
    """Return L_simple + 0.001 L_vlb per image (IDDPM, Equations 9 to 17), with tables in float64."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = torch.from_numpy(np.minimum(1 - f[1:] / f[:-1], 0.999))
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    tilde = beta * (1 - before) / (1 - abar)
    tilde[0] = tilde[1]  # the log of 0 is not used

    def at(table: Tensor) -> Tensor:
        return table.float()[batch.t][:, None, None, None]

    x, noise = batch.x0, batch.noise
    x_t = at(abar.sqrt()) * x + at((1 - abar).sqrt()) * noise
    eps, v = network(x_t, batch.t * 1000 / T, batch.y).chunk(2, dim=1)
    pred = (x_t - at((1 - abar).sqrt()) * eps.detach()) / at(abar.sqrt())
    c0, ct = at(beta * before.sqrt() / (1 - abar)), at((1 - before) * (1 - beta).sqrt() / (1 - abar))
    logvar = (v + 1) / 2 * at(beta.log()) + (1 - v) / 2 * at(tilde.log())
    gap = c0 * (x - pred)
    kl = 0.5 * (logvar - at(tilde.log()) - 1 + (at(tilde.log()) - logvar).exp() + gap**2 * (-logvar).exp())

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, scale = x - (c0 * pred + ct * x_t), (-logvar / 2).exp()
    upper, lower = cdf(scale * (centred + 1 / 255)), cdf(scale * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    term = torch.where(at(torch.arange(T)) == 0, -mass.clamp(min=1e-12).log(), kl)
    return ((noise - eps) ** 2).mean(dim=(1, 2, 3)) + 0.001 * T * term.mean(dim=(1, 2, 3)) / math.log(2)


def restated(config: TrainConfig, data: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of every step, and the averaged weights after the last."""
    dataset = open_dataset(data, 8, 1)
    torch.manual_seed(config.seed)
    model = resolve(config, dataset).model
    network = UNet(model)  # type: ignore[arg-type]  # of a diffusion model
    source = Batches(resolve(config, dataset), dataset, StratifiedSampler(T))
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = [torch.zeros_like(parameter) for parameter in network.parameters()]
    second = [torch.zeros_like(parameter) for parameter in network.parameters()]
    curve = []
    for step in range(1, STEPS + 1):
        loss = hybrid_loss(network, source.draw((step - 1) * config.batch_size)).mean()
        grads = torch.autograd.grad(loss, list(network.parameters()))
        curve.append(loss.item())
        with torch.no_grad():
            for parameter, grad, m, v in zip(network.parameters(), grads, first, second, strict=True):
                m.mul_(BETA1).add_(grad, alpha=1 - BETA1)
                v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
                parameter.mul_(1 - LR * DECAY)
                parameter.sub_(LR * (m / (1 - BETA1**step)) / ((v / (1 - BETA2**step)).sqrt() + 1e-8))
            for name, tensor in network.state_dict().items():
                average[name].mul_(EMA_RATE).add_(tensor, alpha=1 - EMA_RATE)
    return curve, average


def test_a_run_equals_openais_update_step_by_step(tmp_path: Path) -> None:
    """Differences are those of rounding: losses agree to 1e-4 over 300 steps, the weights as a whole to 1e-3."""
    data = write_npz(tmp_path / "toy.npz")
    config = tiny(
        total_images=STEPS * 4, lr=LR, weight_decay=DECAY, ema_decay=EMA_RATE, ema_warmup=False, log_every_batches=1,
        diffusion={"num_timesteps": T, "rescale_timesteps": True}, timestep_sampler="stratified", preview_per_class=0,
        model={**tiny().model.model_dump(), "dropout": 0.0}, checkpoint_every_images=10**6,
    )  # fmt: skip
    model = train(config, data, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / LOG_FILE).read_text().splitlines()]
    curve, average = restated(config, data)
    assert [line["loss"] for line in lines] == pytest.approx(curve, rel=1e-4)
    trained = read_weights(model)
    gap, size = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([trained[name] - average[name] for name in average], list(average.values()))
    )
    assert gap < 1e-3 * size
