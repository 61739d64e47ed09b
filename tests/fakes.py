"""Small stand-ins: a tiny random network in a checkpoint folder, and a runner that only counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from diffusion.classifier import Classifier
from diffusion.config import (
    CheckpointConfig,
    ClassifierCheckpointConfig,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    SamplingDefaults,
)
from diffusion.unet import UNet
from formats.checkpoint import write_checkpoint
from formats.classifier_folder import CLASSIFIER_FOLDER
from service.backends.base import FailureKind, synchronous_failure_kind
from service.backends.pending import Later, Pending
from service.engine.request import (
    GenerationRequest,
    GivenArrays,
    ImageParams,
    ImageStep,
    NetworkOf,
    PlanKey,
    Priority,
    Watch,
)

N = TypeVar("N", bound=nn.Module)

CLASS_NAMES = ("Ape", "Bee", "Cat", "T-shirt/top")


def tiny_config(**changes: object) -> CheckpointConfig:
    """Describe a class-conditional 8x8 network with T = 1000; changes replace fields of its ModelConfig."""
    model = ModelConfig(
        image_size=8,
        image_channels=1,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_heads=2,
        num_classes=len(CLASS_NAMES),
        null_class=True,
    ).replace(**changes)
    return CheckpointConfig(
        model=model,
        diffusion=DiffusionConfig(num_timesteps=1000),
        class_names=None if model.num_classes is None else CLASS_NAMES[: model.num_classes],
        sampling=SamplingDefaults(cfg_scale=1.5) if model.null_class else SamplingDefaults(),
    )


def tiny_network(config: CheckpointConfig) -> UNet:
    """Build the network with random weights, so that the smallest difference in its input changes the output."""
    return _randomised(UNet(config.model))


def _randomised(network: N) -> N:
    network.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network


def tiny_checkpoint(folder: Path, **changes: object) -> Path:
    """Write the tiny network as a checkpoint folder."""
    config = tiny_config(**changes)
    write_checkpoint(folder, config, tiny_network(config).state_dict())
    return folder


def tiny_classifier_config(**changes: object) -> ClassifierCheckpointConfig:
    """Describe a noisy classifier that fits the tiny network; changes replace fields of its ClassifierConfig."""
    model = ClassifierConfig(
        image_size=8,
        image_channels=1,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_heads=2,
        num_classes=len(CLASS_NAMES),
        pool="adaptive",
    ).replace(**changes)
    return ClassifierCheckpointConfig(model=model, diffusion=DiffusionConfig(num_timesteps=1000))


def tiny_classifier(config: ClassifierCheckpointConfig) -> Classifier:
    """Build the classifier with random weights throughout."""
    return _randomised(Classifier(config.model))


def tiny_guided_checkpoint(folder: Path, **changes: object) -> Path:
    """Write the tiny network as a checkpoint folder that contains the classifier that guides it."""
    tiny_checkpoint(folder, **changes)
    config = tiny_classifier_config(image_size=tiny_config(**changes).model.image_size)
    write_checkpoint(folder / CLASSIFIER_FOLDER, config, tiny_classifier(config).state_dict())
    return folder


def params(steps: int = 5, cfg_scale: float = 1.0, seed: int = 0, classifier_scale: float = 0.0) -> ImageParams:
    """Describe an image of which only the amount of work matters."""
    return ImageParams(
        plan=PlanKey(sampler="ancestral", spec=str(steps)),
        num_steps=steps,
        seed=seed,
        image_index=0,
        class_index=0,
        cfg_scale=cfg_scale,
        classifier_scale=classifier_scale,
    )


def generation(
    request_id: str,
    *images: ImageParams,
    model: str = "m",
    client: str = "",
    priority: Priority = Priority.INTERACTIVE,
    deadline_s: float | None = None,
    watch: Watch | None = None,
) -> GenerationRequest:
    """Describe a request."""
    return GenerationRequest(
        request_id=request_id,
        model=model,
        images=images,
        client=client,
        priority=priority,
        deadline_s=deadline_s,
        watch=watch,
    )


class CountingRunner:
    """A runner without a network: it checks its calls, and its images contain the number of their steps."""

    numerics_id = "counting"
    depth = 0
    network_of: NetworkOf | None = None
    trial_given: GivenArrays | None = None
    max_rows = 1024

    def __init__(self, fail_slots_at: dict[int, int] | None = None, error_at: int | None = None) -> None:
        self.steps: dict[int, int] = {}
        self.calls: list[list[int]] = []
        self._fail_slots_at = fail_slots_at or {}
        self._error_at = error_at

    def warm_up(self) -> None:
        """Do nothing."""

    def start(self, steps: Sequence[ImageStep]) -> None:
        for step in steps:
            assert step.step == 0
            self.steps[step.slot] = 0

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        def take() -> list[bool]:
            assert [self.steps[step.slot] for step in steps] == [step.step for step in steps]
            return self.step([step.slot for step in steps])

        return Later(take)

    def step(self, slots: Sequence[int]) -> list[bool]:
        assert len(set(slots)) == len(slots)
        if self._error_at is not None and len(self.calls) >= self._error_at:
            raise RuntimeError("the device caught fire")
        self.calls.append(list(slots))
        for slot in slots:
            self.steps[slot] += 1
        return [self._fail_slots_at.get(slot) != self.steps[slot] for slot in slots]

    def failure_kind(self, error: Exception) -> FailureKind:
        return synchronous_failure_kind(error)

    def check_network(self) -> None:
        if self._error_at is not None and len(self.calls) >= self._error_at:
            raise RuntimeError("the device is still on fire")

    def evict(self, slots: Sequence[int]) -> list[object]:
        return [self.steps.pop(slot) for slot in slots]

    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        for slot, steps in zip(slots, saved, strict=True):
            assert isinstance(steps, int)
            self.steps[slot] = steps

    def padded_rows(self, rows: int) -> int:
        return rows

    def padded_classified_rows(self, rows: int) -> int:
        return 0

    def is_uncaptured(self, rows: int) -> bool:
        return False

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        pixels = np.array([[[[self.steps[slot] % 256]]] for slot in slots], dtype=np.uint8)
        return Later(lambda: pixels)

    def read_values(self, slots: Sequence[int], *, both: bool = False) -> Pending[npt.NDArray[np.float32]]:
        values = np.array([[[[self.steps[slot]]]] * (2 if both else 1) for slot in slots], dtype=np.float32)
        return Later(lambda: values)

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        pixels = self.read(slots).wait() + np.uint8(100)
        return Later(lambda: pixels)
