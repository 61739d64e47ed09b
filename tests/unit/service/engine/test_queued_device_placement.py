"""A queued step on a device whose values cannot be read: it takes no operand from the host and waits for no value.

A CUDA graph may contain neither a copy from host memory nor a wait for the device. Tensors on torch's `meta` device
have shapes and no values: an operation that reads a value raises. Operands in host memory are found by checking every
operation and every index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion.network_inputs import NetworkInputs
from diffusion.noise import unchecked_normal
from formats.precision import Precision
from service.backends.base import DenoiserDefaults, FailureKind
from service.backends.device_queue import Forward, Normal
from service.backends.pending import Later
from service.backends.torch_classifier import TorchClassifier
from service.engine.config import EngineConfig
from service.engine.request import ImageStep
from service.engine.runners import update_form
from service.engine.runners.array_runner import ArrayRunner
from service.engine.runners.step import add_noise_and_advance
from tests.fakes import params, tiny_classifier, tiny_classifier_config, tiny_config, tiny_network

META = torch.device("meta")
CONFIG = EngineConfig(max_rows=4, slots_per_row=1, timed_calls=0)


class HostOperands(TorchDispatchMode):  # type: ignore[no-untyped-call]  # missing in torch's types
    """Refuse operations that have an operand or a result in host memory, except the copies of a queue."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if not self.copies and any(tensor.device.type == "cpu" for tensor in tensors):
            raise AssertionError(f"{func} has an operand or a result in host memory")
        return out

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.copies = True
        yield
        self.copies = False


class HostIndices(TorchFunctionMode):
    """Refuse indices, and values assigned to them, that a CUDA tensor would first copy from host memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = any(isinstance(part, list | np.ndarray) for part in index)
            tensors = any(isinstance(part, Tensor) for part in index)
            if lists or (tensors and func is Tensor.__setitem__ and not isinstance(args[2], Tensor)):
                raise AssertionError("an index, or what is put there, lies in host memory")
        return func(*args, **(kwargs or {}))


class MetaQueue:
    """Implements `DeviceQueue` on the meta device."""

    depth = 2

    def __init__(self, watch: HostOperands, network: Forward[Tensor], classifier: Forward[Tensor]) -> None:
        self.network: Forward[Tensor] = torch.inference_mode()(network)
        self.classifier: Forward[Tensor] | None = classifier
        self.normal: Normal[Tensor] = unchecked_normal
        self._watch = watch

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        raise NotImplementedError

    def capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise NotImplementedError

    def fuse(self, work: Callable[..., Any]) -> Callable[..., Any] | None:
        return None

    def send(self, values: npt.NDArray[Any]) -> Tensor:
        with self._watch.copying():
            return torch.from_numpy(values.copy()).to(META)

    def fetch(self, array: Tensor) -> Later[npt.NDArray[Any]]:
        assert array.device == META
        return Later(lambda: np.zeros(tuple(array.shape), np.float32))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Later[npt.NDArray[Any]]]:
        return self.fetch


class MetaDenoiser(DenoiserDefaults[Any]):
    """The tiny network and its classifier, on the meta device."""

    xp: Any = torch
    device: Any = META
    description = network_id = "meta"
    precision: Precision = "fp32"
    threads = 0
    batch_sizes: tuple[int, ...] | None = (1, 2, 4)

    def __init__(self, watch: HostOperands) -> None:
        self.config = tiny_config()
        self._network = tiny_network(self.config).to(META)
        guide = tiny_classifier_config()
        self.classifier: Any = TorchClassifier(guide, tiny_classifier(guide), "", META, (1, 2, 4))
        self.queue = MetaQueue(watch, lambda inputs: self._network.forward_emb(*inputs), self.classifier.gradient)

    @torch.inference_mode()
    def embed_timesteps(self, t_model: Any) -> Any:
        return self._network.embed_timesteps(t_model)

    def __call__(self, inputs: NetworkInputs[Any]) -> Any:
        raise NotImplementedError

    def failure_kind(self, error: Exception) -> FailureKind:
        return FailureKind.DEVICE


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not switch autocast off in the time MLP: the meta device has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def take_a_step(classifier_scales: Sequence[float]) -> None:
    """Begin, step and read images with and without guidance of either kind; every operation is checked."""
    watch = HostOperands()
    runner = ArrayRunner(MetaDenoiser(watch), CONFIG)
    slots = range(len(classifier_scales))
    with HostIndices(), watch, torch.inference_mode():  # as during a capture
        images = [
            replace(params(steps=3, seed=slot, cfg_scale=1.0 + slot % 2), classifier_scale=scale)
            for slot, scale in zip(slots, classifier_scales, strict=True)
        ]
        for number in range(2):  # the second one has gradients to clear
            steps = [ImageStep(slot=slot, params=images[slot], step=number) for slot in slots]
            if number == 0:
                runner.start(steps)
            assert len(runner.launch(steps).wait()) == len(slots)
        assert runner.read(slots).wait().shape == (len(slots), 8, 8, 1)


@pytest.mark.parametrize("classifier_scales", [[0.0], [0.0, 0.0], [2.0, 0.0]])
def test_a_step_reads_no_value_of_the_device_and_no_operand_from_the_host(classifier_scales: list[float]) -> None:
    take_a_step(classifier_scales)


def test_a_step_with_a_scalar_from_the_host_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_scalar(lines: Tensor, x_t: Tensor, *rest: Any, **named: Any) -> Any:
        return add_noise_and_advance(lines, torch.where(x_t > 0, torch.tensor(1.0), x_t), *rest, **named)

    monkeypatch.setattr(update_form, "add_noise_and_advance", with_a_scalar)
    with pytest.raises(AssertionError, match="in host memory"):
        take_a_step([0.0])


def test_a_step_that_reads_a_value_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_question(lines: Tensor, x_t: Tensor, *rest: Any, **named: Any) -> Any:
        assert not x_t.isnan().any()
        return add_noise_and_advance(lines, x_t, *rest, **named)

    monkeypatch.setattr(update_form, "add_noise_and_advance", with_a_question)
    with pytest.raises(RuntimeError, match="meta"):
        take_a_step([0.0])
