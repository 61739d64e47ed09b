"""ArrayRunner: the runner for numpy arrays and tensors. It owns a model's slots and delegates steps to `Steps`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Generic

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, to_numpy
from diffusion.chains import build_chain
from diffusion.config import DiffusionConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.plans import SamplingPlan
from diffusion.respacing import respace
from diffusion.update import to_uint8
from service.backends.base import Denoiser, FailureKind, GuidingClassifier, RowNetwork
from service.backends.batch_sizes import BatchSizes, largest_size
from service.backends.device_queue import DeviceQueue, send_at_once
from service.backends.pending import Later, Pending
from service.backends.self_test import invariant_batch_sizes
from service.engine.config import EngineConfig
from service.engine.request import ImageParams, ImageStep, PlanKey
from service.engine.runners.host_steps import HostSteps
from service.engine.runners.numbers import PlanOf
from service.engine.runners.queued_steps import QueuedSteps
from service.engine.runners.steps import Embeddings, StepIncomplete, Steps
from service.engine.slots import SavedSlot, SlotTable

log = logging.getLogger(__name__)


class ArrayRunner(Generic[A]):
    """Implements `Runner` with a `SlotTable` in the array type and on the device of its denoiser.

    Raises:
        ModelError: the denoiser was compiled for batches smaller than the engine's width.
    """

    def __init__(self, denoiser: Denoiser[A], config: EngineConfig) -> None:
        classifier: GuidingClassifier[A] | None = denoiser.classifier
        self.numerics_id = _numerics_id(denoiser, config.max_rows)
        self.sizes = BatchSizes(
            network=_untested(denoiser, config.max_rows),
            classifier=() if classifier is None else _untested(classifier, config.max_rows),
        )
        """Allowed batch sizes. Initially only the largest; the self-test adds the bit-identical ones."""
        self._denoiser: Denoiser[A] = denoiser
        self._classifier: GuidingClassifier[A] | None = classifier
        self._max_rows = config.max_rows
        self._num_slots = config.num_slots
        queue: DeviceQueue[A] | None = denoiser.queue
        self.slots: SlotTable[A] = SlotTable(
            denoiser.config.model,
            config.num_slots,
            denoiser.xp,
            denoiser.device,
            send_at_once(denoiser.xp, denoiser.device) if queue is None else queue.send,
        )
        """Arrays of the images in flight; only the runner's own methods may change them while it serves."""
        t_model = self.slots.send(respace(denoiser.config.diffusion).t_model)
        embeddings: Embeddings[A] = Embeddings(
            network=denoiser.embed_timesteps(t_model),
            classifier=None if classifier is None else classifier.embed_timesteps(t_model),
        )
        plan_of = self._plan_of = _plans_of(denoiser.config.diffusion)
        self._queued: QueuedSteps[A] | None = None
        if queue is not None:
            self._queued = QueuedSteps(
                denoiser, queue, self.slots, embeddings, plan_of, self.sizes, strict=config.strict_graphs
            )
        self._steps: Steps = self._queued or HostSteps(denoiser, self.slots, embeddings, plan_of, self.sizes)
        self.depth = self._steps.depth

    def warm_up(self) -> None:
        """Find the batch sizes that are bit-identical to the largest, capture graphs, and take one full step."""
        sizes = self.sizes
        sizes.network = invariant_batch_sizes(self._denoiser, self._max_rows)
        if self._classifier is not None:
            sizes.classifier = invariant_batch_sizes(self._classifier, self._max_rows)
        params = ImageParams(
            plan=PlanKey(sampler="ancestral", spec="2"),
            num_steps=2,
            seed=0,
            image_index=0,
            class_index=0,
            classifier_scale=0.0 if self._classifier is None else 1.0,
        )
        slots = range(1 if self._queued is None else self._num_slots)  # graphs are tested with images in all slots
        steps = [ImageStep(slot=slot, params=params, step=0) for slot in slots]
        self.start(steps)
        if self._queued is not None:
            self._queued.capture(steps)
        self.launch(steps[:1]).wait()
        self.read([0]).wait()
        log.info("bit-identical batch sizes: %s", ", ".join(map(str, sizes.network)))
        if self._classifier is not None:
            log.info(
                "bit-identical batch sizes of %s: %s",
                self._classifier.description,
                ", ".join(map(str, sizes.classifier)),
            )

    def start(self, steps: Sequence[ImageStep]) -> None:
        """Initialize the slots of new images."""
        if steps:
            begins = [self._plan_of(step.params.plan).begin for step in steps]
            self.slots.start([step.slot for step in steps], [step.params for step in steps], begins)

    def evict(self, slots: Sequence[int]) -> list[object]:
        """Copy slots to host memory. The scheduler tracks that they are free."""
        return [*self.slots.save(slots)]

    def restore(self, slots: Sequence[int], saved: Sequence[object]) -> None:
        """Restore evicted images into slots.

        Raises:
            TypeError: a state was not returned by `evict`.
        """
        states = [state for state in saved if isinstance(state, SavedSlot)]
        if len(states) != len(saved):
            raise TypeError("only states returned by `evict` can be restored")
        self.slots.load(slots, states)

    def failure_kind(self, error: Exception) -> FailureKind:
        """Classify an error by means of the denoiser."""
        if isinstance(error, StepIncomplete):
            return FailureKind.DEVICE
        return self._denoiser.failure_kind(error)

    def check_network(self) -> None:
        """Call the network and its classifier on zeros and wait for the results."""
        self._call_on_zeros(self._denoiser, self.padded_rows(1))
        if self._classifier is not None:
            self._call_on_zeros(self._classifier, self.padded_classified_rows(1))

    def padded_rows(self, rows: int) -> int:
        """Round up to the next allowed batch size."""
        return self.sizes.padded_rows(rows)

    def padded_classified_rows(self, rows: int) -> int:
        """Round up to the next allowed batch size of the classifier; 0 without a classifier."""
        return self.sizes.padded_classified_rows(rows)

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Start a step of some images."""
        return self._steps.launch(steps)

    def is_uncaptured(self, rows: int) -> bool:
        """Return whether a step of `rows` rows runs without a captured graph on a device that supports graphs."""
        return self._queued is not None and not self._queued.has_captured(self.padded_rows(rows))

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Start copying finished images; the pending result is pixels."""
        return self._pixels(self.slots.x, slots)

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Start copying predicted images; the pending result is pixels."""
        return self._pixels(self.slots.x0, slots)

    def read_values(self, slots: Sequence[int], *, both: bool = False) -> Pending[npt.NDArray[np.float32]]:
        """Start copying finished images; the pending result is their values."""
        x = self._steps.copied(self.slots.x, slots)
        if not both:
            return x
        log_variance = self._steps.copied(self.slots.x0, slots)
        return Later(lambda: np.concatenate([x.wait(), log_variance.wait()], axis=1))

    def _pixels(self, array: A, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        copied = self._steps.copied(array, slots)
        return Later(lambda: to_uint8(copied.wait()))

    def _call_on_zeros(self, network: RowNetwork[A], rows: int) -> None:
        xp, device = network.xp, network.device
        emb_t = network.embed_timesteps(xp.zeros((rows,), dtype=xp.float32, device=device))
        x_t = xp.zeros((rows, *self.slots.image_shape), dtype=xp.float32, device=device)
        labelled = network.config.model.num_classes is not None
        to_numpy(network(NetworkInputs(x_t, emb_t, self.slots.integers([0] * rows) if labelled else None)))


def _plans_of(diffusion: DiffusionConfig) -> PlanOf:
    """Return a function that builds a model's sampling plans, which `build_chain` caches."""

    def plan_of(key: PlanKey) -> SamplingPlan:
        return build_chain(diffusion, key)

    return plan_of


def _untested(network: RowNetwork[A], max_rows: int) -> tuple[int, ...]:
    """Return the largest batch size, the only one that needs no self-test."""
    return (largest_size(network.batch_sizes, max_rows, network.description),)


def _numerics_id(denoiser: Denoiser[A], max_rows: int) -> str:
    """Return the hash of the network id and the runner's part: array libraries, self-test width and threads."""
    arrays = {np.__name__: np.__version__, denoiser.xp.__name__: denoiser.xp.__version__}
    depends_on = f"{denoiser.network_id}\nwidth {max_rows}\nthreads {denoiser.threads}\narrays {arrays}"
    return hashlib.sha256(depends_on.encode()).hexdigest()[:16]
