"""For the TensorRT backend without a GPU: a small artifact, and a fake of the package that computes on the CPU.

The fake has the names of the real package that inference uses (a test compares them) and none of its behaviour: it
tests control flow. Its plans are JSON; its engines read and write memory at the addresses they get.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion.config import CheckpointConfig
from diffusion.time_mlp import WEIGHTS, TimeMLP
from formats.artifact import (
    MANIFEST_FILE,
    MODEL_FILE,
    TIME_MLP_FILE,
    BandError,
    Manifest,
    NetworkParity,
    file_entry,
    manifest_json,
)
from formats.precision import Precision
from formats.tensorrt_files import EngineRecord, Target, Wanted, entry_of, graph_sha256, write_engine

VERSION = "10.99.0.1"
GPU = "NVIDIA H200"
CAPABILITY = (9, 0)
TARGET = Target.of_device("tensorrt", VERSION, CAPABILITY, GPU)


def parity(error: float = 0.0, precision: Precision = "fp32") -> NetworkParity:
    """Describe a measurement whose limit is 0.01."""
    band = BandError(t_min=0, t_max=999, prediction=error)
    return NetworkParity(backend="tensorrt 10.99", precision=precision, limit=0.01, bands=(band,))


def write_artifact(
    folder: Path,
    config: CheckpointConfig,
    graph: bytes = b"a graph",
    precision: Precision = "fp32",
    buckets: tuple[int, ...] = (1, 2, 4),
    inputs: tuple[str, ...] = (),
) -> Manifest:
    """Write an artifact folder around a graph; its time MLP is random. Without `inputs`, as earlier versions did."""
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_bytes(graph)
    wide, narrow = config.model.emb_channels, config.model.model_channels
    rng = np.random.default_rng(0)
    shapes = [(wide, narrow), (wide,), (wide, wide), (wide,)]
    weights = {
        name: (rng.standard_normal(shape) / 9).astype(np.float32) for name, shape in zip(WEIGHTS, shapes, strict=True)
    }
    TimeMLP(weights).write(folder / TIME_MLP_FILE)
    manifest = Manifest(
        checkpoint=config,
        checkpoint_sha256="0" * 64,
        precision=precision,
        opset=22,
        buckets=buckets,
        inputs=inputs,
        files={name: file_entry(folder / name) for name in (MODEL_FILE, TIME_MLP_FILE)},
        parity=(parity(precision=precision),),
    )
    (folder / MANIFEST_FILE).write_text(manifest_json(manifest))
    return manifest


def wanted_of(manifest: Manifest, target: Target = TARGET) -> Wanted:
    """Return the requirements for engines of an artifact."""
    return Wanted(target, manifest.precision, graph_sha256(manifest.files))


def fake_plan(config: CheckpointConfig, bucket: int, **changes: object) -> bytes:
    """Serialise an engine of the fake; `changes` describe how it misbehaves."""
    model = config.model
    image = [bucket, *model.image_shape]
    tensors = {
        "x_t": (image, "FLOAT"),
        "emb_t": ([bucket, model.emb_channels], "FLOAT"),
        "y": ([bucket], "INT64"),
        "out": ([bucket, model.out_channels, *image[2:]], "FLOAT"),
    }
    if model.cond_shape is not None:
        tensors["cond"] = ([bucket, *model.cond_shape], "FLOAT")
    return json.dumps({"tensors": tensors, **changes}).encode()


def write_fake_engine(
    artifact: Path, manifest: Manifest, bucket: int, store: Path | None = None, **changes: Any
) -> EngineRecord:
    """Write an engine of the fake into an artifact or another store, and its record."""
    assert isinstance(manifest.checkpoint, CheckpointConfig)
    plan = fake_plan(manifest.checkpoint, bucket, **changes)
    wanted = wanted_of(manifest)
    record = EngineRecord(
        target=wanted.target,
        bucket=bucket,
        precision=wanted.precision,
        onnx_sha256=wanted.onnx_sha256,
        plan=entry_of(plan),
        workspace_bytes=0,
    )
    write_engine(artifact / "tensorrt" if store is None else store, plan, record)
    return record


def expected_output(
    x_t: npt.NDArray[Any],
    emb_t: npt.NDArray[Any],
    y: npt.NDArray[Any],
    channels: int,
    cond: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.float32]:
    """Compute the output of an engine of the fake: each row depends on its own inputs only."""
    rows = x_t.mean(axis=(1, 2, 3)) + emb_t.mean(axis=1) + y
    if cond is not None:
        rows = rows + 2 * cond.mean(axis=(1, 2, 3))
    shape = (len(x_t), channels, *x_t.shape[2:])
    return np.broadcast_to(rows[:, None, None, None], shape).astype(np.float32)


class DataType(Enum):
    FLOAT = np.float32
    HALF = np.float16
    BF16 = "bfloat16"
    INT64 = np.int64
    INT32 = np.int32


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class IExecutionContext:
    def __init__(self, description: dict[str, Any]) -> None:
        self._description = description
        self._addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._description["tensors"]

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self._description.get("capturable", True))

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._description.get("fails"):
            return False
        arrays = {name: self._at(name) for name in self._description["tensors"]}
        out = arrays["out"]
        out[:] = expected_output(arrays["x_t"], arrays["emb_t"], arrays["y"], out.shape[1], arrays.get("cond"))
        if self._description.get("unequal"):
            out += np.arange(len(out), dtype=np.float32)[:, None, None, None]
        if self._description.get("nan"):
            out[0] = np.nan
        return True

    def _at(self, name: str) -> npt.NDArray[Any]:
        shape, dtype = self._description["tensors"][name]
        item = np.dtype(DataType[dtype].value)
        size = int(np.prod(shape)) * item.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(self._addresses[name])).cast("B")
        return np.frombuffer(memory, dtype=item).reshape(shape)


class ICudaEngine:
    def __init__(self, description: dict[str, Any]) -> None:
        self._description = description
        self._tensors: dict[str, Any] = description["tensors"]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        shape: list[int] = self._tensors[name][0]
        return shape

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name][1]]

    def create_execution_context(self) -> IExecutionContext | None:
        return None if self._description.get("no_memory") else IExecutionContext(self._description)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        description = json.loads(serialized_engine)
        if error := description.get("error"):
            self._logger.log(ILogger.ERROR, error)
            return None
        return ICudaEngine(description)


def fake_tensorrt() -> types.ModuleType:
    """Make a module `tensorrt` of the classes above."""
    module = types.ModuleType("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, origin="a fake")
    contents = (DataType, ILogger, IExecutionContext, ICudaEngine, Runtime)
    module.__dict__.update({item.__name__: item for item in contents}, __version__=VERSION)
    return module
