"""Measure the gradient noise scale of a checkpoint, by objective and timestep sampler (figures 6 and 7 of IDDPM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from diffusion.config import CheckpointConfig, FrozenConfig
from diffusion.likelihood import VariationalBound
from diffusion.losses import LossType, q_sample, training_losses
from diffusion.noise import STREAM_EVALUATION, normal
from diffusion.respacing import IntArray, respace
from formats.checkpoint_config import describe_validation_error
from trainer.config import TimestepSamplerName
from trainer.data import Dataset
from trainer.evaluation.errors import EvaluationError
from trainer.evaluation.folder import EvaluationStopped
from trainer.evaluation.inputs import RealInputs
from trainer.evaluation.records import Records
from trainer.evaluation.subject import Subject
from trainer.noise_scale import NoiseScale, noise_scale, squared_norms
from trainer.timestep_sampler import LossSecondMomentSampler, TimestepSampler, UniformSampler

SAMPLERS: tuple[TimestepSamplerName, ...] = ("uniform", "loss_second_moment")
"""The samplers whose timesteps are independent, as the estimate assumes; stratified ones are not."""


class Case(NamedTuple):
    """A loss with the sampler of its timesteps."""

    loss: LossType
    sampler: TimestepSamplerName

    def __str__(self) -> str:
        return f"{self.loss}:{self.sampler}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "vlb:uniform".

        Raises:
            ValueError: an unknown loss or sampler.
        """
        loss, _, sampler = text.partition(":")
        losses: tuple[LossType, ...] = ("simple", "hybrid", "vlb")
        for known_loss in losses:
            for known_sampler in SAMPLERS:
                if (loss, sampler) == (known_loss, known_sampler):
                    return cls(known_loss, known_sampler)
        raise ValueError(f"a case is LOSS:SAMPLER with {', '.join(losses)} and {', '.join(SAMPLERS)}; got {text!r}")


class TrainedObjective(FrozenConfig):
    """What a model was trained to minimise; the fields are those of a training configuration."""

    loss: LossType | None = None
    """None: it is not recorded."""
    rescale_vlb: bool = True
    min_snr_gamma: float | None = Field(default=None, gt=0)

    @classmethod
    def of(cls, config: CheckpointConfig) -> Self:
        """Return what a model's configuration records; the defaults for a model without a record.

        Raises:
            EvaluationError: the record has values that this version does not know.
        """
        recorded: Any = config.provenance.get("train_config")
        known = recorded if isinstance(recorded, dict) else {}
        try:
            return cls.model_validate({name: known[name] for name in cls.model_fields if name in known})
        except ValidationError as error:
            raise EvaluationError(
                "this version cannot measure the objective that the model was trained with (train_config in its "
                f"config.json): {describe_validation_error(error)}"
            ) from error

    @property
    def settings(self) -> dict[str, Any]:
        """How losses are weighted, as settings of an evaluation; empty by default."""
        return self.model_dump(include={"rescale_vlb", "min_snr_gamma"}, exclude_defaults=True)


def usual_cases(subject: Subject) -> list[Case]:
    """Return the paper's comparison: the loss that the model was trained with, and L_vlb with both samplers.

    If the loss is not recorded, it is L_hybrid for a learned variance, and L_simple for a fixed one.
    """
    usual: LossType = "hybrid" if subject.config.diffusion.learns_variance else "simple"
    first = TrainedObjective.of(subject.config).loss or usual
    return [Case(first, "uniform"), Case("vlb", "uniform"), Case("vlb", "loss_second_moment")]


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """How much is measured."""

    small: int = 16
    """Images of a small batch, and of a network call."""
    big: int = 256
    """Images of a batch; a multiple of `small`."""
    batches: int = 16
    """Batches per case."""
    history: int = 10
    """Losses per timestep from which the importance weights are computed."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.small < 1 or self.big <= self.small or self.big % self.small:
            raise ValueError(f"the big batch must be a multiple of the small one ({self.small}); got {self.big}")


class GradientNoise:
    """A model with data: draws batches and takes the norms of their gradients.

    Losses are weighted as in the model's training (`rescale_vlb`, `min_snr_gamma`).

    The network runs in eval mode (no dropout), with the labels and conditioning images of the data and without flips:
    the noise is that of images, timesteps and eps.
    """

    def __init__(self, subject: Subject, dataset: Dataset, options: NoiseOptions) -> None:
        if len(subject.networks) > 1:
            raise ValueError(f"{subject.name} is an ensemble; measure its members")
        diffusion = subject.config.diffusion
        self._subject, self._dataset, self._options = subject, dataset, options
        self._network = subject.networks[0].requires_grad_(True)
        self._parameters = list(self._network.parameters())
        self._device = self._parameters[0].device
        self._inputs = RealInputs(subject, dataset)
        self._objective = TrainedObjective.of(subject.config)
        self._bound = VariationalBound.of(diffusion, respace(diffusion), self._device, clip=False)
        self._uniform = UniformSampler(diffusion.num_timesteps)

    @property
    def rows_of_history(self) -> int:
        """Return the number of rows that `importance` evaluates."""
        return self._uniform.num_timesteps * self._options.history

    def importance(
        self,
        file: Path,
        advance: Callable[[int], Any] = lambda rows: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> LossSecondMomentSampler:
        """Return the importance sampler, warmed up with this model's L_t; `file` keeps the losses.

        Raises:
            EvaluationStopped: `stop` returned True.
        """
        options, steps = self._options, self._uniform.num_timesteps
        records = Records(file, steps)
        done = min(len(records), options.history)
        records.truncate(done)
        advance(done * steps)
        for turn in range(done, options.history):
            losses = np.empty(steps, np.float32)
            images = np.random.default_rng((options.seed, 4, turn)).integers(len(self._dataset.labels), size=steps)
            for start in range(0, steps, options.small):
                if stop():
                    raise EvaluationStopped
                t = np.arange(start, min(start + options.small, steps))
                x0, y, conditions = self._inputs.read(images[t])
                noise = self._noise((turn + 1) * 2**24 + t)
                network = partial(self._network, **conditions)
                terms = self._bound.terms(network, x0, y, torch.from_numpy(t).to(self._device), noise)
                losses[t] = terms.vb_bpd.cpu().numpy()
                advance(len(t))
            records.append(losses[None])
        sampler = LossSecondMomentSampler(steps, history_per_term=options.history)
        for losses in records.read(options.history):
            sampler.update(np.arange(steps), losses)
        return sampler

    def measure(
        self,
        case: Case,
        sampler: TimestepSampler | None,
        file: Path,
        advance: Callable[[int], Any] = lambda rows: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> NoiseScale:
        """Measure one case, continuing what `file` holds.

        Args:
            case: what to measure.
            sampler: the importance sampler; None: uniform.
            file: norms of the batches so far.
            advance: called with the number of images that are done.
            stop: called before each batch.

        Raises:
            EvaluationStopped: `stop` returned True.
        """
        options = self._options
        records = Records(file, 2)
        done = min(len(records), options.batches)
        records.truncate(len(records))  # remove half a row of a killed process
        advance(done * options.big)
        for number in range(done, options.batches):
            if stop():
                raise EvaluationStopped
            norms = squared_norms(self._parameters, self._losses(case, sampler or self._uniform, number, advance))
            records.append(np.array([norms], np.float32))
        return noise_scale(records.read(options.batches).astype(np.float64), options.small, options.big)

    def _losses(
        self, case: Case, sampler: TimestepSampler, number: int, advance: Callable[[int], Any]
    ) -> Iterator[Tensor]:
        """Yield the mean weighted loss of each small batch of a batch; images and eps are the same for every case."""
        options = self._options
        rng = np.random.default_rng((options.seed, 3, number))
        images = rng.integers(len(self._dataset.labels), size=options.big)
        t, weights = sampler.sample(rng, options.big)
        for start in range(0, options.big, options.small):
            rows = slice(start, start + options.small)
            x0, y, conditions = self._inputs.read(images[rows])
            noise = self._noise(number * options.big + np.arange(start, start + options.small))
            at = torch.from_numpy(t[rows]).to(self._device)
            x_t = q_sample(self._bound.tables, x0, at, noise)
            output = self._network(x_t, self._bound.t_model[at], y, **conditions)
            losses = training_losses(
                self._bound.tables,
                self._subject.config.diffusion,
                output,
                x0,
                x_t,
                noise,
                at,
                loss=case.loss,
                rescale=self._objective.rescale_vlb,
                min_snr_gamma=self._objective.min_snr_gamma,
            )
            yield (losses.loss * torch.from_numpy(weights[rows]).to(self._device)).mean()
            advance(options.small)

    def _noise(self, rows: IntArray) -> Tensor:
        """Return the eps of rows counted over the measurement; steps are not part of it, so cases share it."""
        index = torch.from_numpy(rows)
        seeds = torch.full_like(index, self._options.seed)
        shape = self._subject.image_shape
        return normal(seeds, index, torch.zeros_like(index), STREAM_EVALUATION, shape).to(self._device)
