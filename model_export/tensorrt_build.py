"""Engines of TensorRT, built from an artifact's ONNX graph: one per batch size, of static shapes.

One engine for all batch sizes has given identical rows different outputs (NVIDIA/TensorRT, issue 4813); here each
batch size is a build of its own, in which the batch is a constant. Networks are strongly typed: the precision is that
of the graph.

`tensorrt` times kernels on the GPU at hand and builds for that. `tensorrt_rtx` builds for a compute capability, needs
no GPU, and leaves the rest to a compiler in the runtime.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from formats.artifact import MODEL_FILE, file_entry, read_artifact
from formats.atomic_file import write_file
from formats.precision import Precision
from formats.tensorrt_files import (
    DATA_FILE,
    TIMING_CACHE_FILE,
    EngineRecord,
    Target,
    Wanted,
    engine_folder,
    entry_of,
    graph_sha256,
    unusable_engines,
    write_engine,
)
from formats.tensorrt_package import EngineError, Flavour, installed_flavour, logger_of

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 4 << 30
"""Most scratch memory of a kernel, where nobody says otherwise."""

Progress = Callable[[str, int, int], None]
"""Told of a build: the phase, its steps done, and how many it has. Phases nest; TensorRT may call from any thread."""
Say = Callable[[str], None]


def build_missing(
    artifact: Path,
    target: Target | None = None,
    batch_sizes: Iterable[int] | None = None,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    say: Say = lambda _: None,
    progress: Progress = lambda _phase, _done, _of: None,
) -> tuple[int, ...]:
    """Build the engines that an artifact lacks, and those that the service would refuse.

    Args:
        artifact: the artifact folder; engines are written into it.
        target: what to build for; None: the GPU at hand (`find_target` makes others).
        batch_sizes: to build for; None: those of the manifest.
        workspace_bytes: most scratch memory of a kernel.
        say: told what is built, and why, in words.
        progress: told how far a build is.

    Returns:
        The batch sizes that were built.

    Raises:
        ArtifactError: an artifact that cannot be read.
        EngineError: no TensorRT, no such GPU, or a build that failed; engines finished before that stay.
    """
    manifest = read_artifact(artifact)
    target = find_target() if target is None else target
    wanted = Wanted(target, manifest.precision, graph_sha256(manifest.files))
    reasons = unusable_engines(artifact, wanted, manifest.buckets if batch_sizes is None else sorted(set(batch_sizes)))
    for batch_size, reason in reasons.items():
        say(f"building {target.name}, batches of {batch_size}: {reason}")
        build_engine(artifact, wanted, batch_size, workspace_bytes=workspace_bytes, progress=progress)
    return tuple(reasons)


def build_engine(
    artifact: Path,
    wanted: Wanted,
    batch_size: int,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
    progress: Progress = lambda _phase, _done, _of: None,
) -> EngineRecord:
    """Build and write one engine, replacing an older one.

    Args:
        artifact: a folder with `model.onnx`, whose inputs have a dynamic first dimension and no other.
        wanted: what the engine is to be. The graph must be that one, and compute in that precision.
        batch_size: rows of its inputs.
        workspace_bytes: most scratch memory of a kernel.
        progress: told how far the build is. Whatever it raises ends the build, and goes on to the caller.

    Returns:
        What was written beside the plan.

    Raises:
        EngineError: another graph than wanted, one that TensorRT cannot parse or build, or a target that is not here;
            with what TensorRT had to say.
    """
    onnx = artifact / MODEL_FILE
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
        cache = TimingCache(config, engine_folder(artifact, wanted.target) / TIMING_CACHE_FILE)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor

    serialized = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if serialized is None:
        raise EngineError(
            f"{onnx}, batches of {batch_size} on {wanted.target.name}: TensorRT built nothing{logger.said()}"
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
    write_engine(artifact, plan, record)
    if cache is not None:
        cache.save()
    return record


def find_target(compute_capability: str | None = None) -> Target:
    """Return what to build for with the package that is installed.

    Args:
        compute_capability: such as `sm89`; None: of the GPU at hand.

    Raises:
        EngineError: no TensorRT, no GPU where one is needed, or a compute capability that it does not have.
    """
    flavour = installed_flavour()
    version = str(importlib.import_module(flavour).__version__)
    if flavour == "tensorrt_rtx" and compute_capability is not None:
        _refuse_unknown_capability(importlib.import_module(flavour), compute_capability)
        return Target(flavour=flavour, version=version, compute_capability=compute_capability)
    if not torch.cuda.is_available():
        how = "" if flavour == "tensorrt" else "; say for which one to build (such as sm89), that needs none"
        raise EngineError(f"{flavour} builds for the GPU at hand, and torch sees none{how}")
    target = Target.of_device(flavour, version, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    if compute_capability not in (None, target.compute_capability):
        raise EngineError(
            f"tensorrt builds for the GPU at hand, which is {target.compute_capability} and not {compute_capability}"
        )
    return target


def load_tensorrt(target: Target) -> Any:
    """Import the package that a target names.

    Raises:
        EngineError: it is not installed, or in another version.
    """
    if installed_flavour() != target.flavour:
        raise EngineError(f"{target.name} needs the package {target.flavour}, which is not the one installed")
    trt = importlib.import_module(target.flavour)
    if trt.__version__ != target.version:
        raise EngineError(f"{target.name} needs {target.flavour} {target.version}; installed is {trt.__version__}")
    return trt


def refuse_other_graph(artifact: Path, onnx_sha256: str) -> None:
    """Refuse to build from a graph that is not the one wanted.

    Raises:
        EngineError: saying so, or that there is no graph.
    """
    names = [name for name in (MODEL_FILE, DATA_FILE) if (artifact / name).is_file()]
    if MODEL_FILE not in names:
        raise EngineError(f"{artifact} has no {MODEL_FILE}")
    found = graph_sha256({name: file_entry(artifact / name) for name in names})
    if found != onnx_sha256:
        raise EngineError(
            f"{artifact / MODEL_FILE} is another graph ({found[:12]}...) than the one wanted ({onnx_sha256[:12]}...)"
        )


def parse(trt: Any, logger: Any, network: Any, onnx: Path) -> None:
    """Read an ONNX file into a network.

    Raises:
        EngineError: with every complaint of the parser, and the node it is about.
    """
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx)):
        return
    complaints = [_describe(parser.get_error(k)) for k in range(parser.num_errors)]
    raise EngineError(f"{onnx} cannot be parsed: {'; '.join(complaints) or 'the parser gives no reason'}")


def fix_batch(network: Any, batch_size: int, onnx: Path) -> None:
    """Make the batch of every input a constant.

    Raises:
        EngineError: an input whose first dimension is not the only dynamic one, or an output that stays dynamic.
    """
    for tensor in (network.get_input(k) for k in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if not shape or shape[0] != -1 or -1 in shape[1:]:
            raise EngineError(f"{onnx}: of input {tensor.name} the batch alone must be dynamic; its shape is {shape}")
        tensor.shape = (batch_size, *shape[1:])
    for tensor in (network.get_output(k) for k in range(network.num_outputs)):
        shape = tuple(tensor.shape)
        if -1 in shape or shape[0] != batch_size:
            raise EngineError(f"{onnx}: output {tensor.name} should have {batch_size} rows; its shape is {shape}")


def network_precision(trt: Any, network: Any) -> Precision:
    """Return what a strongly typed network computes in: the shortest of the floating-point types in it.

    Raises:
        EngineError: float16 and bfloat16, both.
    """
    layers = (network.get_layer(k) for k in range(network.num_layers))
    types = {layer.get_output_type(k) for layer in layers for k in range(layer.num_outputs)}
    short: dict[Any, Precision] = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
    found = [name for dtype, name in short.items() if dtype in types]
    if len(found) > 1:
        raise EngineError("a graph must compute in float16 or in bfloat16; this one does both")
    return found[0] if found else "fp32"


def set_flags(trt: Any, config: Any, flavour: Flavour) -> tuple[str, ...]:
    """Set what is not TensorRT's default; returns the names of all flags that are set."""
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is computed in float32, as by the torch backend
    if flavour == "tensorrt_rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # without it there can be no CUDA graph
    return tuple(sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)))


def choose_capability(trt: Any, config: Any, compute_capability: str) -> None:
    """Let TensorRT-RTX build for one compute capability, whatever GPU is at hand.

    Raises:
        EngineError: one that it does not have.
    """
    _refuse_unknown_capability(trt, compute_capability)
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(trt.ComputeCapability.__members__[compute_capability.upper()], 0):
        raise EngineError(f"TensorRT-RTX {trt.__version__} does not build for {compute_capability}")


class TimingCache:
    """How long kernels took, kept beside the engines, so that the next batch size need not be measured anew.

    For the data-centre package: with TensorRT-RTX, which times nothing, it would only demand a GPU.
    """

    def __init__(self, config: Any, path: Path) -> None:
        """Give a build the cache of a file; one of another GPU or version is replaced, with a warning."""
        self._path = path
        self._cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            log.warning("%s is of another GPU or version; kernels are measured anew", path)
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, False)

    def save(self) -> None:
        """Write what is known after the build."""
        write_file(self._path, bytes(self._cache.serialize()))


def _profile(builder: Any, network: Any) -> Any:
    """Return the one profile: smallest, usual and largest shape of every input are the same."""
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
            " (GPUs of data centres need the package tensorrt)"
        )


def _refuse_other_gpu(target: Target) -> None:
    here = find_target()
    if here != target:
        raise EngineError(f"tensorrt builds for the GPU at hand, which is {here.name} and not {target.name}")


def _describe(error: Any) -> str:
    where = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_name() else ""
    return f"{where}{error.desc()}"


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of an untyped module
        """Counts the steps of phases; an exception must not cross TensorRT's own code, so it is kept for later."""

        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            self._tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, step + 1)
            return self.error is None  # False ends the build

        def phase_finish(self, phase: str) -> None:
            self._tell(phase, self._steps.get(phase, 0))

        def _tell(self, phase: str, done: int) -> None:
            if self.error is not None:
                return
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:  # KeyboardInterrupt, too: raised again when TensorRT returns
                self.error = error

    return Monitor()
