"""Load TensorRT engines, one per batch size, and run them on torch's tensors and current stream.

This code has never been run: no GPU supported by the installed packages was available (docs/tensorrt.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.network_inputs import NetworkInputs
from formats.tensorrt_package import logger_of
from service.errors import ModelError

OUTPUT = "out"

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors of a graph by name: shape and type, batch included."""


class EngineNetwork:
    """Engines by batch size, callable like a network."""

    def __init__(self, trt: Any, device: torch.device) -> None:
        """Start TensorRT's runtime on a device.

        Args:
            trt: the package `tensorrt` or `tensorrt_rtx`.
            device: a CUDA device.
        """
        self._trt = trt
        self._device = device
        self._logger = logger_of(trt)
        self._runtime = trt.Runtime(self._logger)
        self._contexts: dict[int, Any] = {}
        self._outputs: dict[int, tuple[int, ...]] = {}

    def load(self, plan: bytes, size: int, shapes: Shapes) -> None:
        """Deserialise the engine for a batch size. A plan is executable code: pass only plans with a verified hash.

        Raises:
            ModelError: TensorRT rejects the plan, its tensors are not as expected, or memory does not suffice.
        """
        self._logger.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ModelError(f"TensorRT cannot load the engine for batches of {size}{self._logger.error_suffix()}")
        if problem := mismatch(engine_shapes(self._trt, engine), shapes):
            raise ModelError(f"the engine for batches of {size} is not this model's: {problem}")
        context = engine.create_execution_context()
        if context is None:
            raise ModelError(f"TensorRT cannot prepare the engine for batches of {size}{self._logger.error_suffix()}")
        self._contexts[size] = context  # keeps its engine
        self._outputs[size] = shapes[OUTPUT][0]

    def capturable(self, stream: int) -> bool:
        """Return whether all engines can be captured in CUDA graphs. Only TensorRT-RTX reports it; else assumed.

        Args:
            stream: handle of the stream to capture.
        """
        checks = [getattr(context, "is_stream_capturable", None) for context in self._contexts.values()]
        return all(check is None or check(stream) for check in checks)

    def __call__(self, inputs: NetworkInputs[Tensor]) -> Tensor:
        """Start the engine of the batch's size on the current stream, without waiting for it.

        The inputs must have the types of the graph. Their memory may be reused by later work on the stream only.

        Raises:
            ValueError: there is no engine for the batch's size.
            RuntimeError: TensorRT could not start the engine.
        """
        size = len(inputs.x_t)
        context = self._contexts.get(size)
        if context is None:
            sizes = ", ".join(map(str, sorted(self._contexts)))
            raise ValueError(f"batch size must be one of {sizes}, as built; got {size}")
        self._logger.errors.clear()
        out = torch.empty(self._outputs[size], device=self._device)
        # A captured step passes labels as a column of its numbers; TensorRT knows no strides
        given = {name: values.contiguous() for name, values in inputs._asdict().items() if values is not None}
        placed = [context.set_tensor_address(name, t.data_ptr()) for name, t in {**given, OUTPUT: out}.items()]
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            started = all(placed) and context.execute_async_v3(stream)
        if not started:
            raise RuntimeError(f"TensorRT did not run the engine for batches of {size}{self._logger.error_suffix()}")
        return out


def engine_shapes(trt: Any, engine: Any) -> Shapes:
    """Return the inputs and outputs of a deserialised engine."""
    types = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
    }
    names = [engine.get_tensor_name(k) for k in range(engine.num_io_tensors)]
    return {name: (tuple(engine.get_tensor_shape(name)), types[engine.get_tensor_dtype(name)]) for name in names}


def mismatch(found: Shapes, expected: Shapes) -> str | None:
    """Describe how an engine's tensors differ from the expected ones; None if equal. TensorRT checks no addresses."""
    for name in sorted({*found, *expected}):
        if name not in expected:
            return f"it has a tensor {name}"
        if name not in found:
            return f"it has no tensor {name}"
        if found[name] != expected[name]:
            return f"{name} is {_shown(found[name])} instead of {_shown(expected[name])}"
    return None


def _shown(tensor: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{list(tensor[0])} {str(tensor[1]).removeprefix('torch.')}"
