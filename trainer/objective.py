"""Objectives: the network that a run trains, its losses, and the checkpoint it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.classifier import Classifier
from diffusion.config import CheckpointConfig, ClassifierCheckpointConfig, ClassifierConfig, ModelConfig
from diffusion.losses import LossTables, q_sample, training_losses
from diffusion.respacing import respace
from diffusion.unet import UNet
from formats.checkpoint_config import AnyCheckpointConfig
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.preview import Examples, write_preview

Network = Callable[..., Tensor]
"""A network as the losses call it: under autocast, and wrapped for several processes."""

EIGHT_BITS = (0.0, 255.0)
"""Range of the values of data that have no range of their own."""
MAX_LOSS = 100.0
"""Mean squared error (predicting zeros gives about 1) or cross-entropy above which a network counts as diverged."""


class Objective(Protocol):
    """What a run trains, and how."""

    num_steps: int
    """S, timesteps that batches are noised with."""
    by_quartile: tuple[str, ...]
    """Losses whose means are also logged for each quarter of the timesteps."""
    judged_by: str
    """The loss that shows whether the network has diverged, or overfits; `loss` may have any scale."""

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the default device."""
        ...

    def losses(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of each image by name, [B]; the one named `loss` is minimised."""
        ...

    def checkpoint(self, class_names: tuple[str, ...] | None, provenance: Mapping[str, Any]) -> AnyCheckpointConfig:
        """Return the configuration that a checkpoint stores."""
        ...

    def write_preview(
        self,
        path: Path,
        described: AnyCheckpointConfig,
        weights: dict[str, Tensor],
        stop: Callable[[], bool],
        shown: Dataset,
    ) -> None:
        """Draw a picture of what the network can do, if it can draw one; `shown` are images that it may begin with."""
        ...


class _OnNoisedImages:
    """The tables that objectives on noised images share."""

    def __init__(self, config: TrainConfig, device: torch.device | str) -> None:
        self._config = config
        process = respace(config.diffusion)
        self.num_steps = process.num_steps
        self._tables = LossTables.from_process(process, device)
        self._t_model = torch.from_numpy(process.t_model).to(device)

    def _noised(self, batch: Batch) -> Tensor:
        return q_sample(self._tables, batch.x0, batch.t, batch.noise)


class DiffusionObjective(_OnNoisedImages):
    """L_simple, L_vlb or L_hybrid of a UNet (diffusion/losses.py)."""

    judged_by = "mse"

    def __init__(self, config: TrainConfig, device: torch.device | str) -> None:
        super().__init__(config, device)
        has_bound = config.loss == "vlb" or config.diffusion.learns_variance
        self.by_quartile: tuple[str, ...] = ("loss", "mse", *(["vb_bpd"] if has_bound else []))

    def build(self) -> nn.Module:
        return UNet(_model(self._config))

    def losses(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        x_t = self._noised(batch)
        output = network(x_t, self._t_model[batch.t], batch.y, **batch.conditions)
        assert self._config.loss != "cross_entropy"  # noqa: S101  # the configuration allows it for classifiers only
        return training_losses(
            self._tables,
            self._config.diffusion,
            output,
            batch.x0,
            x_t,
            batch.noise,
            batch.t,
            loss=self._config.loss,
            rescale=self._config.rescale_vlb,
            min_snr_gamma=self._config.min_snr_gamma,
        )._asdict()

    def checkpoint(self, class_names: tuple[str, ...] | None, provenance: Mapping[str, Any]) -> AnyCheckpointConfig:
        config = self._config
        return CheckpointConfig(
            model=_model(config),
            diffusion=config.diffusion,
            class_names=class_names,
            value_range=config.data.value_range or EIGHT_BITS,
            **({"cond_range": config.data.cond_range or EIGHT_BITS} if config.cond_channels else {}),
            sampling=config.sampling,
            provenance=dict(provenance),
        )

    def write_preview(
        self,
        path: Path,
        described: AnyCheckpointConfig,
        weights: dict[str, Tensor],
        stop: Callable[[], bool],
        shown: Dataset,
    ) -> None:
        assert isinstance(described, CheckpointConfig)  # noqa: S101  # what `checkpoint` returns
        config = self._config
        examples = None if _model(config).cond_shape is None else Examples(config, shown, config.preview_per_class)
        write_preview(path, described, weights, config.preview_per_class, config.preview_steps, stop, examples)


class ClassifierObjective(_OnNoisedImages):
    """Cross-entropy of a noisy classifier (ADM, arXiv:2105.05233, section 4.1): images noised to any timestep."""

    by_quartile: tuple[str, ...] = ("loss", "acc@1", "acc@5")
    judged_by = "loss"

    def build(self) -> nn.Module:
        return Classifier(_classifier(self._config))

    def losses(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        assert batch.y is not None  # noqa: S101  # a classifier has classes
        logits = network(self._noised(batch), self._t_model[batch.t])
        with torch.no_grad():
            above = (logits > logits.gather(1, batch.y[:, None])).sum(dim=1)
        return {
            "loss": F.cross_entropy(logits, batch.y, reduction="none"),
            "acc@1": (above < 1).float(),
            "acc@5": (above < 5).float(),
        }

    def checkpoint(self, class_names: tuple[str, ...] | None, provenance: Mapping[str, Any]) -> AnyCheckpointConfig:
        return ClassifierCheckpointConfig(
            model=_classifier(self._config),
            diffusion=self._config.diffusion,
            class_names=class_names,
            provenance=dict(provenance),
        )

    def write_preview(
        self,
        path: Path,
        described: AnyCheckpointConfig,
        weights: dict[str, Tensor],
        stop: Callable[[], bool],
        shown: Dataset,
    ) -> None:
        """Do nothing: a classifier draws nothing."""


def objective_of(config: TrainConfig, device: torch.device | str) -> Objective:
    """Return the objective of a configuration, with its tables on a device."""
    return (DiffusionObjective if isinstance(config.model, ModelConfig) else ClassifierObjective)(config, device)


def _model(config: TrainConfig) -> ModelConfig:
    assert isinstance(config.model, ModelConfig)  # noqa: S101  # see `objective_of`
    return config.model


def _classifier(config: TrainConfig) -> ClassifierConfig:
    assert isinstance(config.model, ClassifierConfig)  # noqa: S101  # see `objective_of`
    return config.model
