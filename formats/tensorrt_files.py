"""TensorRT engine files: their names, their records, and the checks before use.

A store holds the engines of one graph, by GPU, TensorRT version and batch size (field `bucket` of the record). It is
the folder `tensorrt` of the artifact, or a folder named after the graph in one that keeps the engines of all graphs:

    tensorrt/sm89-rtx-1.7.1.116/4.plan         the engine for a batch of 4
    tensorrt/sm89-rtx-1.7.1.116/4.json         its record, written last: a plan without a record is not used
    tensorrt/nvidia-h200-sm90-10.13.3.9/...    of the data-centre package, whose engines run on one GPU model
    tensorrt/nvidia-h200-sm90-10.13.3.9/timing.cache

An engine is code that TensorRT runs. Its hash protects against damage and mix-ups, not against a user with write
access to the folder. Nothing here needs TensorRT, a GPU or PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from diffusion.config import FrozenConfig
from formats.artifact import MODEL_FILE, FileEntry, NetworkParity, Sha256
from formats.atomic_file import write_file
from formats.checkpoint_config import describe_validation_error
from formats.precision import Precision
from formats.tensorrt_package import EngineError, Flavour

FOLDER = "tensorrt"
TIMING_CACHE_FILE = "timing.cache"
DATA_FILE = f"{MODEL_FILE}.data"
"""Weights of a graph beyond protobuf's 2 GiB."""


class EngineRejected(EngineError):
    """An engine cannot be used, only because its measured parity is outside the limit."""


class Target(FrozenConfig):
    """The GPU and package that an engine is built for. An engine runs on no other target."""

    flavour: Flavour
    version: str = Field(pattern=r"^[0-9A-Za-z.+]+$")
    """Version of the package: TensorRT loads engines of its own version only."""
    compute_capability: str = Field(pattern=r"^sm\d{2,3}$")
    """For example sm89."""
    gpu: str | None = None
    """Name of the GPU; None with TensorRT-RTX, whose engines run on all GPUs of a compute capability."""

    @classmethod
    def of_device(cls, flavour: Flavour, version: str, capability: tuple[int, int], gpu: str) -> Self:
        """Return the target of a GPU from its compute capability and name."""
        sm = f"sm{capability[0]}{capability[1]}"
        return cls(flavour=flavour, version=version, compute_capability=sm, gpu=gpu if flavour == "tensorrt" else None)

    @property
    def name(self) -> str:
        """Name of the folder, made of letters, digits, dots and dashes."""
        flavour = "rtx-" if self.flavour == "tensorrt_rtx" else ""
        gpu = "" if self.gpu is None else re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-") + "-"
        return f"{gpu}{self.compute_capability}-{flavour}{self.version}"


@dataclass(frozen=True)
class Wanted:
    """The properties that an engine needs to be used for a graph on a GPU."""

    target: Target
    precision: Precision
    onnx_sha256: str
    """See `graph_sha256`."""


class EngineRecord(FrozenConfig):
    """The description of an engine; the content of `<bucket>.json`."""

    format_version: Literal[1] = 1
    target: Target
    bucket: int = Field(ge=1)
    """Batch size of its inputs."""
    precision: Precision
    """Precision in which the graph computes."""
    onnx_sha256: Sha256
    """Hash of the graph it was built from, see `graph_sha256`."""
    plan: FileEntry
    flags: tuple[str, ...] = ()
    """Builder flags, by TensorRT's names."""
    workspace_bytes: int = Field(ge=0)
    """Limit of the scratch memory of its kernels, in bytes."""
    parity: NetworkParity | None = None
    """Measured error against PyTorch; None: not measured."""


BuildEngines = Callable[[Path, Path, Target, tuple[int, ...]], None]
"""(artifact folder, store, target, batch sizes): build missing engines, but not those that are `EngineRejected`.
The service gets one if it may build."""


def graph_sha256(files: Mapping[str, FileEntry]) -> str:
    """Return the hash of a graph from its files by name: `model.onnx`, and `model.onnx.data` if there is one."""
    digests = [files[name].sha256 for name in (MODEL_FILE, DATA_FILE) if name in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def engine_store(artifact: Path, onnx_sha256: str, engines_dir: str | None = None) -> Path:
    """Return the folder of a graph's engines.

    Args:
        artifact: the artifact folder.
        onnx_sha256: see `graph_sha256`.
        engines_dir: folder of the engines of all graphs; None or empty: engines are kept in the artifact.
    """
    return Path(engines_dir) / onnx_sha256[:16] if engines_dir else artifact / FOLDER


def engine_folder(store: Path, target: Target) -> Path:
    """Return the folder of a store's engines for a target."""
    return store / target.name


def write_engine(store: Path, plan: bytes, record: EngineRecord) -> Path:
    """Write an engine into a store: first the plan, then its record, each atomically.

    Args:
        store: see `engine_store`.
        plan: the serialised engine, which `record.plan` describes.
        record: the engine's target and description.

    Returns:
        The plan's path.

    Raises:
        EngineError: the record describes another plan.
    """
    if record.plan != entry_of(plan):
        raise EngineError(f"the record of bucket {record.bucket} describes another plan")
    folder = engine_folder(store, record.target)
    folder.mkdir(parents=True, exist_ok=True)
    path, record_path = _paths(folder, record.bucket)
    record_path.unlink(missing_ok=True)  # a new plan under an old record would look damaged
    write_file(path, plan)
    _write_record(folder, record)
    return path


def read_engine(store: Path, wanted: Wanted, batch_size: int) -> tuple[EngineRecord, bytes]:
    """Read an engine and check that it is what is wanted.

    Returns:
        Its record, and its checked content.

    Raises:
        EngineRejected: the engine is too far from PyTorch.
        EngineError: it is missing, damaged, stale or built for another target. Both name the file and the reason.
    """
    record = _read_record(store, wanted, batch_size)
    path = _paths(engine_folder(store, wanted.target), batch_size)[0]
    plan = path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != record.plan.sha256:
        raise EngineError(f"{path} is damaged or was replaced: its sha256 differs from its record's")
    if record.parity is not None and not record.parity.passed:
        raise EngineRejected(
            f"{path} is too far from PyTorch: relative error {record.parity.worst:.1e}, limit "
            f"{record.parity.limit:.1e}; iddpm export --format tensorrt (without --gpu, and with CUDA in torch) builds "
            "and measures it again"
        )
    return record, plan


def unusable_engines(store: Path, wanted: Wanted, batch_sizes: Iterable[int]) -> dict[int, EngineError]:
    """Return the batch sizes whose engine is missing or fails the checks, each with the error of `read_engine`."""
    errors = {}
    for batch_size in batch_sizes:
        try:
            read_engine(store, wanted, batch_size)
        except EngineError as error:
            errors[batch_size] = error
    return errors


def refusal(record: EngineRecord, wanted: Wanted, batch_size: int) -> str | None:
    """Return why an engine with that record is not what is wanted; None if it is."""
    if record.target != wanted.target:
        return f"was built for {record.target.name}, and this is {wanted.target.name}"
    if record.bucket != batch_size:
        return f"was built for batches of {record.bucket}"
    if record.onnx_sha256 != wanted.onnx_sha256:
        return f"is stale: it was built from another graph ({record.onnx_sha256[:12]}...) than {MODEL_FILE} is now"
    if record.precision != wanted.precision:
        return f"computes in {record.precision}, and the artifact in {wanted.precision}"
    return None


def record_parity(store: Path, wanted: Wanted, batch_size: int, parity: NetworkParity) -> None:
    """Record an engine's measured parity; if it is outside the limit, the engine is rejected from then on.

    Raises:
        EngineError: as for `read_engine`.
    """
    record, _ = read_engine(store, wanted, batch_size)
    _write_record(engine_folder(store, wanted.target), record.replace(parity=parity))


def entry_of(content: bytes) -> FileEntry:
    """Return the size and hash of a file's content."""
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def _paths(folder: Path, batch_size: int) -> tuple[Path, Path]:
    return folder / f"{batch_size}.plan", folder / f"{batch_size}.json"


def _write_record(folder: Path, record: EngineRecord) -> None:
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(_paths(folder, record.bucket)[1], text.encode())


def _read_record(store: Path, wanted: Wanted, batch_size: int) -> EngineRecord:
    """Read and check a record; of the plan, check only that it exists and has the recorded size."""
    folder = engine_folder(store, wanted.target)
    path, record_path = _paths(folder, batch_size)
    for file in (record_path, path):
        if file.is_symlink():
            raise EngineError(f"{file} is a link; engines must be regular files")
    if not record_path.is_file():
        raise EngineError(_missing(store, folder, batch_size))
    try:
        content: Any = json.loads(record_path.read_text(encoding="utf-8"))
        record = EngineRecord.model_validate(content)
    except ValidationError as error:
        raise EngineError(f"{record_path}: {describe_validation_error(error)}") from error
    except (OSError, ValueError) as error:
        raise EngineError(f"{record_path} cannot be read: {error}") from error
    if reason := refusal(record, wanted, batch_size):
        raise EngineError(f"{path} {reason}")
    if not path.is_file():
        raise EngineError(f"{path} is missing, although {record_path.name} describes it")
    if path.stat().st_size != record.plan.size:
        raise EngineError(f"{path} has {path.stat().st_size} bytes instead of {record.plan.size}: it is damaged")
    return record


def _missing(store: Path, folder: Path, batch_size: int) -> str:
    others = sorted(path.name for path in store.glob("*") if path.is_dir() and path != folder)
    note = f"; the engines for {', '.join(others)} cannot be used here" if others else ""
    return f"{folder} has no engine for batches of {batch_size}{note}"
