"""The runner, for numpy arrays and tensors alike: gather, network, guidance, noise, one update, scatter."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, on_host, to_numpy
from diffusion.guidance import classifier_free, scaled_gradient
from diffusion.noise import STREAM_STEP, normal
from diffusion.plans import build_plan
from diffusion.update import PlanRows, begin_advance, finish_advance, split_output, to_uint8
from service.backends.base import Denoiser, FailureKind, GuidingClassifier, RowNetwork, beginning_of
from service.backends.pending import Later, Pending
from service.backends.self_test import invariant_batch_sizes
from service.engine.config import EngineConfig
from service.engine.request import ImageParams, PlanKey, Start
from service.engine.slots import SavedSlot, SlotTable
from service.errors import ModelError

log = logging.getLogger(__name__)


class _Gathered(NamedTuple, Generic[A]):
    """What a step's images hold as it begins."""

    slots: Sequence[int]
    where: A
    """The same, as an array."""
    x_t: A
    step: A
    line: A
    """Of the plan table."""
    y: A


class ArrayRunner(Generic[A]):
    """Implements `Runner` with a `SlotTable` of the kind, and on the device, that its denoiser takes.

    Raises:
        ModelError: the denoiser was compiled for batches smaller than the engine's width.
    """

    def __init__(self, denoiser: Denoiser[A], config: EngineConfig) -> None:
        classifier: GuidingClassifier[A] | None = denoiser.classifier
        self.numerics_id = _numerics_id(denoiser, config.max_rows)
        self.batch_sizes = _largest_size(denoiser, config.max_rows)
        """Rows a network call may have; the self-test finds more than the largest."""
        self.classifier_batch_sizes = () if classifier is None else _largest_size(classifier, config.max_rows)
        """Rows a classifier call may have, likewise; none where there is no classifier."""
        self._denoiser: Denoiser[A] = denoiser
        self._begin: Callable[[A, A, A | None], Pending[A]] = beginning_of(denoiser)
        self._classifier: GuidingClassifier[A] | None = classifier
        self._max_rows = config.max_rows
        self._channels = denoiser.config.model.image_channels
        self._null_class = denoiser.config.model.num_classes or 0
        self._conditional = denoiser.config.model.num_classes is not None
        self._beside = ThreadPoolExecutor(1, "noise")
        self._slots: SlotTable[A] = SlotTable(
            denoiser.config,
            config.num_slots,
            config.plan_lines,
            denoiser.xp,
            denoiser.device,
            None if classifier is None else classifier.config,
        )

    def warm_up(self) -> None:
        """Find the batch sizes that give a row the same bits as the largest, then take a real step."""
        self.batch_sizes = invariant_batch_sizes(self._denoiser, self._max_rows)
        if self._classifier is not None:
            self.classifier_batch_sizes = invariant_batch_sizes(self._classifier, self._max_rows)
        params = ImageParams(
            plan=PlanKey(sampler="ancestral", spec="2"),
            num_steps=2,
            seed=0,
            image_index=0,
            class_index=0,
            classifier_scale=0.0 if self._classifier is None else 1.0,
        )
        self.start([Start(slot=0, params=params, plan_offset=0, write_plan=True)])
        self.launch([0]).wait()
        self.read([0]).wait()
        log.info("batch sizes that give a row equal bits: %s", ", ".join(map(str, self.batch_sizes)))
        if self._classifier is not None:
            log.info("%s: %s", self._classifier.description, ", ".join(map(str, self.classifier_batch_sizes)))

    def start(self, starts: Sequence[Start]) -> None:
        """Set slots up; plans are computed here, once for all images that share one."""
        xp, device = self._denoiser.xp, self._denoiser.device
        for start in {start.plan_offset: start for start in starts if start.write_plan}.values():
            key = start.params.plan
            plan = build_plan(self._denoiser.config.diffusion, key.sampler, key.spec, key.eta)
            t_model = xp.asarray(plan.column("t_model").copy(), device=device)
            classifier_emb_t = None if self._classifier is None else self._classifier.embed_timesteps(t_model)
            self._slots.write_plan(start.plan_offset, plan, self._denoiser.embed_timesteps(t_model), classifier_emb_t)
        if starts:
            self._slots.start([s.slot for s in starts], [s.params for s in starts], [s.plan_offset for s in starts])

    def launch(self, slots: Sequence[int]) -> Pending[list[bool]]:
        """Gather what the network reads, and begin its call; all else is done when the step is waited for.

        All is computed before anything is written, so that a step that raised can be taken again.
        """
        table = self._slots
        index = table.integers(slots)
        step = table.step[index]
        line = table.plan_offset[index] + step
        images: _Gathered[A] = _Gathered(slots, index, table.x[index], step, line, table.y[index])
        guided: list[int] = [place for place, slot in enumerate(slots) if table.is_guided[slot]]
        call: Pending[A] = self._begin_network(images, guided)
        return Later(lambda: self._finish(images, guided, call))

    def _finish(self, images: _Gathered[A], guided: Sequence[int], call: Pending[A]) -> list[bool]:
        """Do what can be done meanwhile, wait for the network, and update."""
        table, index = self._slots, images.where
        rows = PlanRows.from_lines(table.plan[images.line])
        noise = self._begin_noise(rows, images)
        begun = begin_advance(rows, images.x_t, table.x0[index])
        next_step = images.step + 1
        asking = [place for place, slot in enumerate(images.slots) if table.is_classified[slot]]

        out = call.wait()
        out = self._guide(out, guided, index) if guided else out[: len(images.slots)]
        prediction, var_values = split_output(out, self._channels)
        gradient = self._gradient(images, asking) if asking else None
        result = finish_advance(begun, prediction, var_values, noise(), gradient)

        table.x[index] = result.x_prev
        table.x0[index] = result.x0
        table.step[index] = next_step
        ok: list[bool] = to_numpy(result.ok).tolist()
        return ok

    def evict(self, slots: Sequence[int]) -> list[object]:
        """Copy slots to host memory; that they are free is known to the scheduler."""
        return [*self._slots.save(slots)]

    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        """Put evicted images back.

        Raises:
            TypeError: a state that `evict` did not return.
        """
        states = [state for state in saved if isinstance(state, SavedSlot)]
        if len(states) != len(saved):
            raise TypeError("only what `evict` returned can be restored")
        self._slots.load(slots, states)

    def classify(self, error: Exception) -> FailureKind:
        """Ask the denoiser."""
        return self._denoiser.classify(error)

    def probe(self) -> None:
        """Call the network, and its classifier, on zeros, and wait for what they return."""
        self._call_on_zeros(self._denoiser, self.padded_rows(1))
        if self._classifier is not None:
            self._call_on_zeros(self._classifier, self.padded_classified_rows(1))

    def padded_rows(self, rows: int) -> int:
        """Round up to the next batch size that may be run."""
        return self.batch_sizes[bisect_left(self.batch_sizes, rows)]

    def padded_classified_rows(self, rows: int) -> int:
        """Round up to the next batch size that the classifier may be run at; 0 where there is none."""
        sizes = self.classifier_batch_sizes
        return sizes[bisect_left(sizes, rows)] if sizes else 0

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy finished images; waited for, as pixels."""
        x: A = self._slots.x[self._slots.integers(slots)]
        return Later(lambda: to_uint8(x))

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Copy predicted images; waited for, as pixels."""
        x0: A = self._slots.x0[self._slots.integers(slots)]
        return Later(lambda: to_uint8(x0))

    def _begin_noise(self, rows: PlanRows[A], images: _Gathered[A]) -> Callable[[], A]:
        """Return what gives the step's noise; on the host it is made meanwhile, while the network is called."""
        shape: tuple[int, int, int] = self._slots.image_shape
        seeds, image_indices, steps = self._slots.seed[images.where], self._slots.image_index[images.where], images.step
        if not on_host(seeds):
            return lambda: normal(seeds, image_indices, steps, STREAM_STEP, shape)
        if not bool((rows.noise_scale > 0).any()):
            return lambda: self._denoiser.xp.zeros_like(images.x_t)
        return self._beside.submit(normal, seeds, image_indices, steps, STREAM_STEP, shape).result

    def _begin_network(self, images: _Gathered[A], guided: Sequence[int]) -> Pending[A]:
        """Begin a call on [n] images plus a second row, with the null class, for each guided one."""
        count: int = len(images.slots)
        used = count + len(guided)
        padding: list[int] = [0] * (self.padded_rows(used) - used)  # any row will do: its result is not looked at
        x_t, emb_t, labels = images.x_t, self._slots.emb_t[images.line], images.y
        if guided or padding:
            rows = self._slots.integers([*range(count), *guided, *padding])
            x_t, emb_t, labels = x_t[rows], emb_t[rows], labels[rows]
            labels[count:used] = self._null_class
        return self._begin(x_t, emb_t, labels if self._conditional else None)

    def _guide(self, out: A, guided: Sequence[int], index: A) -> A:
        """Combine the rows of guided images; returns those of all images."""
        count: int = len(index)
        uncond_row = list(range(count))
        for row, place in enumerate(guided, start=count):
            uncond_row[place] = row
        uncond = self._slots.integers(uncond_row)
        return classifier_free(out[uncond], out[:count], self._slots.cfg_scale[index], self._channels)

    def _gradient(self, images: _Gathered[A], asking: Sequence[int]) -> A:
        """Call the classifier on the images that ask for it; the others' gradient is zero.

        Raises:
            ModelError: an image that asks for a classifier that is not there.
        """
        table = self._slots
        if self._classifier is None:
            raise ModelError(
                f"{self._denoiser.description}: the model has no classifier, and classifier_scale is not 0"
            )
        count: int = len(asking)
        padding: list[int] = [asking[0]] * (self.padded_classified_rows(count) - count)
        rows = table.integers([*asking, *padding])
        out = self._classifier(images.x_t[rows], table.classifier_emb_t[images.line[rows]], images.y[rows])
        scale = table.classifier_scale[images.where[rows[:count]]]
        gradient: A = self._denoiser.xp.zeros_like(images.x_t)
        gradient[rows[:count]] = scaled_gradient(out[:count], scale)
        return gradient

    def _call_on_zeros(self, network: RowNetwork[A], rows: int) -> None:
        xp, device = network.xp, network.device
        emb_t = network.embed_timesteps(xp.zeros((rows,), dtype=xp.float32, device=device))
        x_t = xp.zeros((rows, *self._slots.image_shape), dtype=xp.float32, device=device)
        labelled = network.config.model.num_classes is not None
        to_numpy(network(x_t, emb_t, self._slots.integers([0] * rows) if labelled else None))


def _largest_size(network: RowNetwork[A], max_rows: int) -> tuple[int, ...]:
    """Return the one batch size that needs no self-test: the largest that was compiled, or the engine's width."""
    compiled = network.batch_sizes
    if compiled is None:
        return (max_rows,)
    if max_rows > compiled[-1]:
        raise ModelError(
            f"{network.description}: max_rows must be at most {compiled[-1]}, the largest batch that it was "
            f"compiled for; got {max_rows}"
        )
    return (compiled[-1],)


def _numerics_id(denoiser: Denoiser[A], max_rows: int) -> str:
    """Add what the runner contributes: noise and update, and the width and threads of its self-test."""
    arrays = {np.__name__: np.__version__, denoiser.xp.__name__: denoiser.xp.__version__}
    depends_on = f"{denoiser.numerics_id}\nwidth {max_rows}\nthreads {denoiser.threads}\narrays {arrays}"
    return hashlib.sha256(depends_on.encode()).hexdigest()[:16]
