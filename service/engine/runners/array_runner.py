"""ArrayRunner: the runner for numpy arrays and tensors. It owns a model's slots and delegates steps to `Steps`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from typing import Generic
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from diffusion.arrays import A, to_numpy
from diffusion.chains import build_chain
from diffusion.config import DiffusionConfig
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import unchecked_normal
from diffusion.plans import SamplingPlan
from diffusion.respacing import respace
from diffusion.update import to_uint8
from formats.checkpoint_config import AnyCheckpointConfig
from service.backends.base import Denoiser, FailureKind, GuidingClassifier, RowNetwork
from service.backends.batch_sizes import BatchSizes, largest_size
from service.backends.device_queue import DeviceQueue, send_at_once
from service.backends.ensemble import DenoiserEnsemble, common_sizes, networks_of
from service.backends.pending import Later, Pending
from service.backends.self_test import invariant_batch_sizes
from service.engine.config import EngineConfig
from service.engine.request import GivenArrays, ImageParams, ImageStep, NetworkOf, PlanKey
from service.engine.runners.host_steps import HostSteps
from service.engine.runners.numbers import PlanOf
from service.engine.runners.queued_steps import QueuedSteps
from service.engine.runners.steps import Embeddings, StepIncomplete, Steps
from service.engine.slots import SavedSlot, SlotTable
from service.errors import ModelError

log = logging.getLogger(__name__)


class ArrayRunner(Generic[A]):
    """Implements `Runner` with a `SlotTable` in the array type and on the device of its denoiser.

    Raises:
        ModelError: the denoiser was compiled for batches smaller than the engine's width.
    """

    def __init__(self, model: Denoiser[A] | DenoiserEnsemble[A], config: EngineConfig) -> None:
        networks: tuple[Denoiser[A], ...] = networks_of(model)
        classifiers = [network.classifier for network in networks if network.classifier is not None]
        self.sizes = BatchSizes(
            network=_largest(networks, config.max_rows), classifier=_largest(classifiers, config.max_rows)
        )
        """Allowed batch sizes. Initially only the largest; the self-test adds the bit-identical ones."""
        self._networks: tuple[Denoiser[A], ...] = networks
        self._classifiers: list[GuidingClassifier[A]] = classifiers
        self._max_rows = config.max_rows
        self._num_slots = config.num_slots
        first = networks[0]
        queue: DeviceQueue[A] | None = first.queue
        self.slots: SlotTable[A] = SlotTable(
            model.config.model,
            config.num_slots,
            first.xp,
            first.device,
            send_at_once(first.xp, first.device) if queue is None else queue.send,
            unchecked_normal if queue is None else queue.normal,
        )
        """Arrays of the images in flight; only the runner's own methods may change them while it serves."""
        self._plan_of = _plans_of(model.config.diffusion)
        self._queued: list[QueuedSteps[A]] = []
        """Those of `_steps` that run on a device queue: all, or none."""
        self._steps = [self._steps_of(network, config) for network in networks]
        """One per network, on the same slots."""
        self.numerics_id = _numerics_id(model, config.max_rows, {steps.update_form for steps in self._queued})
        self.depth = self._steps[0].depth
        self.network_of = _network_lookup(model, self._plan_of)
        cond_shape = model.config.model.cond_shape
        self.trial_given = None if cond_shape is None else GivenArrays(cond=np.ones(cond_shape, np.float32))

    def _steps_of(self, network: Denoiser[A], config: EngineConfig) -> Steps:
        t_model = self.slots.send(respace(network.config.diffusion).t_model)
        classifier: GuidingClassifier[A] | None = network.classifier
        embeddings: Embeddings[A] = Embeddings(
            network=network.embed_timesteps(t_model),
            classifier=None if classifier is None else classifier.embed_timesteps(t_model),
        )
        queue: DeviceQueue[A] | None = network.queue
        if queue is None:
            return HostSteps(network, self.slots, embeddings, self._plan_of, self.sizes)
        strict = config.strict_graphs
        queued = QueuedSteps(network, queue, self.slots, embeddings, self._plan_of, self.sizes, strict=strict)
        self._queued.append(queued)
        return queued

    @property
    def max_rows(self) -> int:
        """Return the engine's width, or the largest allowed batch size if that is smaller."""
        return min(self._max_rows, self.sizes.most_rows)

    def warm_up(self) -> None:
        """Find the largest set of bit-identical batch sizes, capture graphs, and take a step per network."""
        sizes = self.sizes
        sizes.network = common_sizes([invariant_batch_sizes(network, self._max_rows) for network in self._networks])
        if self._classifiers:
            sizes.classifier = common_sizes(
                [invariant_batch_sizes(classifier, self._max_rows) for classifier in self._classifiers]
            )
        params = ImageParams(
            plan=PlanKey(sampler="ancestral", spec="2"),
            num_steps=2,
            seed=0,
            image_index=0,
            class_index=0,
            classifier_scale=1.0 if self._classifiers else 0.0,
            given=self.trial_given,
        )
        slots = range(self._num_slots if self._queued else 1)  # graphs are tested with images in all slots
        steps = [ImageStep(slot=slot, params=params, step=0) for slot in slots]
        for taker in self._steps:
            self.start(steps)
            if isinstance(taker, QueuedSteps):
                taker.capture(steps)
            taker.launch(steps[:1]).wait()
        self.read([0]).wait()
        log.info("bit-identical batch sizes: %s", ", ".join(map(str, sizes.network)))
        if self._classifiers:
            log.info(
                "bit-identical batch sizes of %s: %s",
                self._classifiers[0].description,
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
        """Classify an error by means of the network; all networks are of one backend."""
        if isinstance(error, StepIncomplete):
            return FailureKind.DEVICE
        return self._networks[0].failure_kind(error)

    def check_network(self) -> None:
        """Call every network and classifier on zeros and wait for the results."""
        for network in self._networks:
            self._call_on_zeros(network, self.padded_rows(1))
        for classifier in self._classifiers:
            self._call_on_zeros(classifier, self.padded_classified_rows(1))

    def padded_rows(self, rows: int) -> int:
        """Round up to the next allowed batch size."""
        return self.sizes.padded_rows(rows)

    def padded_classified_rows(self, rows: int) -> int:
        """Round up to the next allowed batch size of the classifier; 0 without a classifier."""
        return self.sizes.padded_classified_rows(rows)

    def launch(self, steps: Sequence[ImageStep]) -> Pending[list[bool]]:
        """Start a step of some images, all of one network."""
        network = 0
        if self.network_of is not None:
            (network,) = {self.network_of(step.params, step.step) for step in steps}
        return self._steps[network].launch(steps)

    def is_uncaptured(self, rows: int) -> bool:
        """Return whether a step of `rows` rows runs without a captured graph on a device that supports graphs."""
        return not all(queued.has_captured(self.padded_rows(rows)) for queued in self._queued)

    def read(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Start copying finished images; the pending result is pixels."""
        return self._pixels(self.slots.x, slots)

    def preview(self, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        """Start copying predicted images; the pending result is pixels."""
        return self._pixels(self.slots.x0, slots)

    def read_values(self, slots: Sequence[int], *, both: bool = False) -> Pending[npt.NDArray[np.float32]]:
        """Start copying finished images; the pending result is their values."""
        x = self._steps[0].copied(self.slots.x, slots)
        if not both:
            return x
        log_variance = self._steps[0].copied(self.slots.x0, slots)
        return Later(lambda: np.concatenate([x.wait(), log_variance.wait()], axis=1))

    def _pixels(self, array: A, slots: Sequence[int]) -> Pending[npt.NDArray[np.uint8]]:
        copied = self._steps[0].copied(array, slots)
        return Later(lambda: to_uint8(copied.wait()))

    def _call_on_zeros(self, network: RowNetwork[A], rows: int) -> None:
        xp, device = network.xp, network.device
        emb_t = network.embed_timesteps(xp.zeros((rows,), dtype=xp.float32, device=device))
        x_t = xp.zeros((rows, *self.slots.image_shape), dtype=xp.float32, device=device)
        y = None if network.config.model.num_classes is None else self.slots.integers([0] * rows)
        shape = (rows, _cond_channels(network.config), *self.slots.image_shape[1:])
        cond = xp.zeros(shape, dtype=xp.float32, device=device) if shape[1] else None
        to_numpy(network(NetworkInputs(x_t, emb_t, y, cond)))


def _cond_channels(config: AnyCheckpointConfig) -> int:
    """Return the channels of a network's conditioning image; 0 for a network without, and for classifiers."""
    shape = config.model.cond_shape if config.kind == "unet" else None
    return 0 if shape is None else shape[0]


def _plans_of(diffusion: DiffusionConfig) -> PlanOf:
    """Return a function that builds a model's sampling plans.

    It keeps the plans of images in flight, because the bounded cache of `build_chain` may hold fewer than take a step.
    """
    in_use: WeakKeyDictionary[PlanKey, SamplingPlan] = WeakKeyDictionary()

    def plan_of(key: PlanKey) -> SamplingPlan:
        plan = in_use.get(key)
        if plan is None:
            plan = in_use[key] = build_chain(diffusion, key)
        return plan

    return plan_of


def _largest(networks: Sequence[RowNetwork[A]], max_rows: int) -> tuple[int, ...]:
    """Return the largest batch size of all networks, the only one that needs no self-test; () without networks.

    Raises:
        ModelError: a network was compiled for smaller batches, or the networks' largest sizes differ.
    """
    sizes = {largest_size(network.batch_sizes, max_rows, network.description) for network in networks}
    if len(sizes) > 1:
        raise ModelError(f"the networks of an ensemble must be compiled for equal batch sizes; got {sorted(sizes)}")
    return tuple(sizes)


def _network_lookup(model: Denoiser[A] | DenoiserEnsemble[A], plan_of: PlanOf) -> NetworkOf | None:
    """Return the function that finds the network of an image's step; None for a model of one network."""
    if not isinstance(model, DenoiserEnsemble):
        return None
    network_at: list[int] = model.network_of.tolist()  # not the model: the scheduler must not keep its weights
    return lambda params, step: network_at[plan_of(params.plan).timesteps[step]]


def _numerics_id(model: Denoiser[A] | DenoiserEnsemble[A], max_rows: int, update_forms: Collection[str]) -> str:
    """Return the hash of the network id and the runner's part: array libraries, self-test width and threads; on a
    device queue also the forms of the update."""
    arrays = {np.__name__: np.__version__, model.xp.__name__: model.xp.__version__}
    depends_on = f"{model.network_id}\nwidth {max_rows}\nthreads {model.threads}\narrays {arrays}"
    if update_forms:
        depends_on += f"\nupdate {sorted(update_forms)}"
    return hashlib.sha256(depends_on.encode()).hexdigest()[:16]
