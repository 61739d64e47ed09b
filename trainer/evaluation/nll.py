"""Evaluate bits/dim over a data set: per image and timestep, resumable, for one or several models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from diffusion.likelihood import VariationalBound, likelihood_process
from diffusion.noise import STREAM_EVALUATION, normal
from diffusion.respacing import IntArray, Process
from trainer.data import Dataset, eight_bit_images
from trainer.evaluation.folder import EvaluationStopped
from trainer.evaluation.inputs import RealInputs
from trainer.evaluation.records import FloatArray, Records
from trainer.evaluation.subject import Subject

TERMS = ("vb_bpd", "eps_mse", "x0_mse")
"""What is recorded of every image and step, as in `BoundTerms`."""
BATCHES_PER_BLOCK = 8
"""Network calls between two writes, at least."""


@dataclass(frozen=True, kw_only=True)
class NllOptions:
    """Everything besides model and data that determines the result."""

    respacing: str = ""
    """See `space_timesteps`; "" is the full chain."""
    extra_steps: bool = False
    """See `likelihood_process`."""
    images: int
    """Number of images: the first ones of a permutation of the data that depends on the seed only."""
    seed: int = 0
    """Of the noise, and of the choice of images."""
    batch_size: int = 64
    """Rows of a network call; it changes the result by rounding errors only."""

    def process_of(self, subject: Subject) -> Process:
        """Return the process over which a model is evaluated.

        Raises:
            ValueError: a respacing that cannot be met.
        """
        return likelihood_process(subject.config.diffusion, self.respacing, extra_steps=self.extra_steps)

    def steps_of(self, subject: Subject) -> int:
        """Return the number of steps of that process."""
        return self.process_of(subject).num_steps


class NllTerms(NamedTuple):
    """The result of one model; images in the order of `chosen_images`, steps in that of `timesteps`, ascending."""

    timesteps: IntArray
    """int64 [S]: training timesteps."""
    terms: npt.NDArray[np.float32]
    """[N, 3, S]: the terms of TERMS."""
    prior_bpd: FloatArray
    """[N]."""

    @property
    def vb_bpd(self) -> FloatArray:
        """L_t by image and step, [N, S]."""
        return self.terms[:, 0]

    @property
    def total_bpd(self) -> npt.NDArray[np.float64]:
        """Bits/dim of every image, float64 [N]."""
        return self.vb_bpd.sum(axis=1, dtype=np.float64) + self.prior_bpd


def chosen_images(dataset: Dataset, options: NllOptions) -> IntArray:
    """Return the indices of the images to evaluate; more images continue the same sequence."""
    order = np.random.default_rng((options.seed, 2)).permutation(len(dataset.labels))
    return order[: options.images].astype(np.int64)


def inputs_of(subject: Subject, dataset: Dataset) -> RealInputs:
    """Return the images of a data set as inputs of a model whose likelihood is evaluated.

    Raises:
        DataError: the images do not have 8 bits, as the decoder's term assumes; the classes of the data are not those
            of the model; the data lack the conditioning images that it takes.
    """
    eight_bit_images(dataset, np.zeros(1, np.int64))
    return RealInputs(subject, dataset)


def evaluate_nll(
    subject: Subject,
    dataset: Dataset,
    options: NllOptions,
    file: Path,
    *,
    advance: Callable[[int], Any] = lambda rows: None,
    stop: Callable[[], bool] = lambda: False,
) -> NllTerms:
    """Evaluate the bound of a model's images, continuing what `file` holds.

    The noise of x_t is a function of (seed, index of the image in the data, training timestep): the same in every
    batch, for every model and after every interruption.

    Args:
        subject: the model.
        dataset: images of the model's shape, with labels and conditioning images if the model takes them.
        options: what to evaluate.
        file: of this model and these options, except `images` and `batch_size`; created if it does not exist.
        advance: called with the number of rows (an image at a step) that are done, the recorded ones first.
        stop: called after each block of images; True ends the evaluation.

    Raises:
        EvaluationStopped: `stop` returned True; call again to continue.
        DataError: an image cannot be read, or the data do not fit the model (`inputs_of`).
        ValueError: a respacing that cannot be met.
        OSError: the file cannot be written.
    """
    evaluated = _Evaluated(subject, dataset, options)
    steps, chosen = evaluated.steps, chosen_images(dataset, options)
    records = Records(file, len(TERMS) * steps + 1)
    per_block = max(1, BATCHES_PER_BLOCK * options.batch_size // steps)
    done = min(len(records), len(chosen))
    if done < len(chosen):
        done -= done % per_block  # the same batches as without the interruption, so that rounding is the same
        records.truncate(done)
    advance(done * steps)
    for start in range(done, len(chosen), per_block):
        if stop():
            raise EvaluationStopped
        block = chosen[start : start + per_block]
        records.append(evaluated.block(block, advance))
    values = records.read(len(chosen))
    terms = values[:, :-1].reshape(len(chosen), len(TERMS), steps)
    return NllTerms(evaluated.bound.process.timestep_map, terms, values[:, -1])


class _Evaluated:
    """A model with its process, data and device."""

    def __init__(self, subject: Subject, dataset: Dataset, options: NllOptions) -> None:
        self._subject = subject
        self._options = options
        self._device = next(subject.networks[0].parameters()).device
        self._inputs = inputs_of(subject, dataset)
        process = options.process_of(subject)
        self.bound = VariationalBound.of(subject.config.diffusion, process, self._device)
        self.steps = process.num_steps

    def block(self, images: IntArray, advance: Callable[[int], Any]) -> FloatArray:
        """Return one record per image, float32 [n, 3 S + 1]."""
        inputs = self._inputs.read(images)
        terms = np.empty((len(images), len(TERMS), self.steps), np.float32)
        for member, network in enumerate(self._subject.networks):
            its_steps = np.flatnonzero(self._subject.network_of[self.bound.process.timestep_map] == member)
            steps, places = (part.ravel() for part in np.meshgrid(its_steps, np.arange(len(images)), indexing="ij"))
            for start in range(0, len(steps), self._options.batch_size):
                rows = slice(start, start + self._options.batch_size)
                place, step = places[rows], steps[rows]
                x0, y, conditions = inputs.rows(torch.from_numpy(place).to(self._device))
                found = self.bound.terms(
                    partial(network, **conditions),
                    x0,
                    y,
                    torch.from_numpy(step).to(self._device),
                    self._noise(images[place], step),
                )
                terms[place, :, step] = torch.stack(found, dim=1).cpu().numpy()
                advance(len(step))
        prior_bpd = self.bound.prior_bpd(inputs.x0).cpu().numpy()
        return np.concatenate([terms.reshape(len(images), -1), prior_bpd[:, None]], axis=1)

    def _noise(self, images: IntArray, steps: IntArray) -> torch.Tensor:
        index = torch.from_numpy(images)
        t = torch.from_numpy(self.bound.process.timestep_map[steps])
        seeds = torch.full_like(index, self._options.seed)
        return normal(seeds, index, t, STREAM_EVALUATION, self._subject.image_shape).to(self._device)
