"""Build TensorRT engines from an artifact's ONNX graph: one per batch size, with static shapes.

A single engine for all batch sizes has returned different outputs for equal rows (NVIDIA/TensorRT, issue 4813), so each
batch size is a separate build, in which the batch is a constant. Networks are strongly typed: the precision is that of
the graph.

`tensorrt` times kernels on this machine's GPU and builds for that. `tensorrt_rtx` builds for a compute capability and
needs no GPU; its runtime compiles the kernels.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from formats.artifact import MODEL_FILE, file_entry, read_artifact
from formats.atomic_file import write_file
from formats.folder_lock import FolderInUse, folder_lock
from formats.precision import Precision
from formats.tensorrt_files import (
    DATA_FILE,
    TIMING_CACHE_FILE,
    EngineRecord,
    EngineRejected,
    Target,
    Wanted,
    engine_folder,
    engine_store,
    entry_of,
    graph_sha256,
    unusable_engines,
    write_engine,
)
from formats.tensorrt_package import EngineError, Flavour, installed_flavour, logger_of

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 4 << 30
"""Default limit of a kernel's scratch memory."""

Progress = Callable[[str, int, int], None]
"""Called with the phase of a build, its finished steps and its number of steps. Phases nest; any thread may call."""
Notify = Callable[[str], None]


def build_missing(
    artifact: Path,
    target: Target | None = None,
    batch_sizes: Iterable[int] | None = None,
    *,
    store: Path | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    rebuild_rejected: bool = False,
    notify: Notify = lambda _: None,
    progress: Progress = lambda _phase, _done, _of: None,
) -> tuple[int, ...]:
    """Build the missing engines of an artifact, and those that are damaged, stale or built for another target.

    If another process builds in the same folder, wait until it has finished, and build only what is still missing.

    Args:
        artifact: the artifact folder.
        target: the GPU to build for; None: this machine's GPU (`find_target` returns others).
        batch_sizes: sizes to build; None: those of the manifest.
        store: folder of the engines (`engine_store`); None: in the artifact.
        workspace_bytes: limit of a kernel's scratch memory.
        rebuild_rejected: whether engines that are too far from PyTorch are built again too. Only for a caller that then
            measures them: a new engine has no parity, and the service would use it.
        notify: called with a message that describes each build and its reason.
        progress: called with the progress of a build.

    Returns:
        The batch sizes that were built.

    Raises:
        ArtifactError: the artifact cannot be read.
        EngineRejected: an engine is too far from PyTorch, and is not to be built again; nothing was built.
        EngineError: TensorRT or the GPU is missing, or a build failed; engines built before are kept.
        OSError: the folder of the engines cannot be written.
    """
    manifest = read_artifact(artifact)
    target = find_target() if target is None else target
    wanted = Wanted(target, manifest.precision, graph_sha256(manifest.files))
    store = engine_store(artifact, wanted.onnx_sha256) if store is None else store
    sizes = manifest.buckets if batch_sizes is None else sorted(set(batch_sizes))
    with _only_builder(engine_folder(store, target), notify):
        reasons = unusable_engines(store, wanted, sizes)
        rejected = [str(reason) for reason in reasons.values() if isinstance(reason, EngineRejected)]
        if rejected and not rebuild_rejected:
            raise EngineRejected("\n".join(rejected))
        for batch_size, reason in reasons.items():
            notify(f"building {target.name}, batches of {batch_size}: {reason}")
            build_engine(artifact, wanted, batch_size, store=store, workspace_bytes=workspace_bytes, progress=progress)
    return tuple(reasons)


@contextmanager
def _only_builder(folder: Path, notify: Notify) -> Iterator[None]:
    """Make a folder, and lock it against other builders inside the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            unlocked = stack.enter_context(folder_lock(folder))
        except FolderInUse as busy:
            notify(f"{folder}: waiting for another process ({busy.holder}), which builds engines there")
            unlocked = stack.enter_context(folder_lock(folder, wait=True))
        if unlocked is not None:
            log.warning("%s cannot be locked (%s): build in it with one process at a time", folder, unlocked.strerror)
        yield


def build_engine(
    artifact: Path,
    wanted: Wanted,
    batch_size: int,
    *,
    store: Path | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    progress: Progress = lambda _phase, _done, _of: None,
) -> EngineRecord:
    """Build and write one engine, replacing an older one.

    Args:
        artifact: a folder with `model.onnx`, whose inputs have only one dynamic dimension, the first.
        wanted: description of the engine. Graph and precision must match it.
        batch_size: rows of its inputs.
        store: folder of the engines; None: in the artifact.
        workspace_bytes: limit of a kernel's scratch memory.
        progress: called with the progress of the build. An exception raised by it ends the build and propagates.

    Returns:
        The record written beside the plan.

    Raises:
        EngineError: the graph is not the wanted one, TensorRT cannot parse or build it, or the target is not
            available; the message includes TensorRT's messages.
    """
    onnx = artifact / MODEL_FILE
    store = engine_store(artifact, wanted.onnx_sha256) if store is None else store
    refuse_other_graph(artifact, wanted.onnx_sha256)
    trt = load_tensorrt(wanted.target)
    logger = logger_of(trt)
    logger.errors.clear()

    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(trt, logger, network, onnx)
    fix_batch(network, batch_size, onnx)
    if (precision := network_precision(trt, network)) != wanted.precision:
        raise EngineError(f"{onnx} computes in {precision}; wanted is {wanted.precision}")

    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network))
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    flags = set_flags(trt, config, wanted.target.flavour)
    cache: TimingCache | None = None
    if wanted.target.flavour == "tensorrt_rtx":
        choose_capability(trt, config, wanted.target.compute_capability)
    else:
        _refuse_other_gpu(wanted.target)
        cache = TimingCache(config, engine_folder(store, wanted.target) / TIMING_CACHE_FILE)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor

    serialized = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if serialized is None:
        raise EngineError(
            f"{onnx}, batches of {batch_size} on {wanted.target.name}: TensorRT built nothing{logger.error_suffix()}"
        )
    plan = bytes(serialized)
    record = EngineRecord(
        target=wanted.target,
        bucket=batch_size,
        precision=precision,
        onnx_sha256=wanted.onnx_sha256,
        plan=entry_of(plan),
        flags=flags,
        workspace_bytes=workspace_bytes,
    )
    write_engine(store, plan, record)
    if cache is not None:
        cache.save()
    return record


def find_target(compute_capability: str | None = None) -> Target:
    """Return the build target for the installed package.

    Args:
        compute_capability: such as `sm89`; None: that of this machine's GPU.

    Raises:
        EngineError: TensorRT or a required GPU is missing, or the compute capability is not supported.
    """
    flavour = installed_flavour()
    version = str(importlib.import_module(flavour).__version__)
    if flavour == "tensorrt_rtx" and compute_capability is not None:
        _refuse_unknown_capability(importlib.import_module(flavour), compute_capability)
        return Target(flavour=flavour, version=version, compute_capability=compute_capability)
    if not torch.cuda.is_available():
        how = "" if flavour == "tensorrt" else "; name a compute capability (such as sm89) to build without a GPU"
        raise EngineError(f"{flavour} builds for this machine's GPU, and torch finds none{how}")
    target = Target.of_device(flavour, version, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    if compute_capability not in (None, target.compute_capability):
        raise EngineError(
            f"tensorrt builds for this machine's GPU, which is {target.compute_capability} and not {compute_capability}"
        )
    return target


def load_tensorrt(target: Target) -> Any:
    """Import the package that a target names.

    Raises:
        EngineError: it is not installed, or another version is.
    """
    if installed_flavour() != target.flavour:
        raise EngineError(f"{target.name} needs the package {target.flavour}, which is not the one installed")
    trt = importlib.import_module(target.flavour)
    if trt.__version__ != target.version:
        raise EngineError(f"{target.name} needs {target.flavour} {target.version}; installed is {trt.__version__}")
    return trt


def refuse_other_graph(artifact: Path, onnx_sha256: str) -> None:
    """Check that the artifact's graph is the wanted one.

    Raises:
        EngineError: it is another one, or there is no graph.
    """
    names = [name for name in (MODEL_FILE, DATA_FILE) if (artifact / name).is_file()]
    if MODEL_FILE not in names:
        raise EngineError(f"{artifact} has no {MODEL_FILE}")
    found = graph_sha256({name: file_entry(artifact / name) for name in names})
    if found != onnx_sha256:
        raise EngineError(
            f"{artifact / MODEL_FILE} is not the wanted graph: its sha256 is {found[:12]}..., not {onnx_sha256[:12]}..."
        )


def parse(trt: Any, logger: Any, network: Any, onnx: Path) -> None:
    """Read an ONNX file into a network.

    Raises:
        EngineError: with every error of the parser and its node.
    """
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        return
    complaints = [_describe(parser.get_error(k)) for k in range(parser.num_errors)]
    raise EngineError(f"{onnx} cannot be parsed: {'; '.join(complaints) or 'the parser gave no reason'}")


def fix_batch(network: Any, batch_size: int, onnx: Path) -> None:
    """Make the batch of every input a constant.

    Raises:
        EngineError: an input has other dynamic dimensions than the first, or an output stays dynamic.
    """
    for tensor in (network.get_input(k) for k in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if not shape or shape[0] != -1 or -1 in shape[1:]:
            raise EngineError(f"{onnx}: only the batch of input {tensor.name} may be dynamic; its shape is {shape}")
        tensor.shape = (batch_size, *shape[1:])
    for tensor in (network.get_output(k) for k in range(network.num_outputs)):
        shape = tuple(tensor.shape)
        if -1 in shape or shape[0] != batch_size:
            raise EngineError(f"{onnx}: output {tensor.name} must have {batch_size} rows; its shape is {shape}")


def network_precision(trt: Any, network: Any) -> Precision:
    """Return the precision of a strongly typed network: the shortest of its floating-point types.

    Raises:
        EngineError: it uses both float16 and bfloat16.
    """
    layers = (network.get_layer(k) for k in range(network.num_layers))
    types = {layer.get_output_type(k) for layer in layers for k in range(layer.num_outputs)}
    short: dict[Any, Precision] = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
    found = [name for dtype, name in short.items() if dtype in types]
    if len(found) > 1:
        raise EngineError("a graph must use float16 or bfloat16; this one uses both")
    return found[0] if found else "fp32"


def set_flags(trt: Any, config: Any, flavour: Flavour) -> tuple[str, ...]:
    """Set the flags that differ from TensorRT's defaults; return the names of all flags that are set."""
    config.clear_flag(trt.BuilderFlag.TF32)  # computes float32 in float32, as the torch backend does
    if flavour == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # required for CUDA graphs
    return tuple(sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)))


def choose_capability(trt: Any, config: Any, compute_capability: str) -> None:
    """Make TensorRT-RTX build for one compute capability, regardless of this machine's GPU.

    Raises:
        EngineError: the compute capability is not supported.
    """
    _refuse_unknown_capability(trt, compute_capability)
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(trt.ComputeCapability.__members__[compute_capability.upper()], 0):
        raise EngineError(f"TensorRT-RTX {trt.__version__} does not build for {compute_capability}")


class TimingCache:
    """Measured kernel times, stored beside the engines, so that the next batch size does not measure them again.

    Used with the data-centre package only: TensorRT-RTX does not time kernels, and a cache would make it require a GPU.
    """

    def __init__(self, config: Any, path: Path) -> None:
        """Load the cache of a file into a build; replace a cache of another GPU or version, with a warning."""
        self._path = path
        self._cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            log.warning("%s is of another GPU or version; kernels are measured again", path)
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, False)

    def save(self) -> None:
        """Write the cache after the build."""
        write_file(self._path, bytes(self._cache.serialize()))


def _profile(builder: Any, network: Any) -> Any:
    """Return the profile: minimum, optimum and maximum shape of every input are equal."""
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(k) for k in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        profile.set_shape(tensor.name, shape, shape, shape)
    return profile


def _refuse_unknown_capability(trt: Any, compute_capability: str) -> None:
    known = sorted(name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    if compute_capability not in known:
        raise EngineError(
            f"TensorRT-RTX {trt.__version__} builds for {', '.join(known)}; got {compute_capability!r}"
            " (data-centre GPUs need the package tensorrt)"
        )


def _refuse_other_gpu(target: Target) -> None:
    here = find_target()
    if here != target:
        raise EngineError(f"tensorrt builds for this machine's GPU, which is {here.name} and not {target.name}")


def _describe(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.desc()}"


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of an untyped module
        """Count the steps of phases; exceptions must not pass through TensorRT's code, so they are raised later."""

        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            self._report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(phase, step + 1)
            return self.error is None  # False ends the build

        def phase_finish(self, phase: str) -> None:
            self._report(phase, self._steps.get(phase, 0))

        def _report(self, phase: str, done: int) -> None:
            if self.error is not None:
                return
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:  # also KeyboardInterrupt; raised again when TensorRT returns
                self.error = error

    return Monitor()
