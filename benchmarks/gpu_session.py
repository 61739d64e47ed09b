"""Measure everything that needs a GPU, in three calls of at most nine minutes, and write the results as a section.

    python -m benchmarks.gpu_session lives   --device cuda      # versions, rates, tests, what can be captured, bits
    python -m benchmarks.gpu_session time    --device cuda      # eager, graph, step, compiled; profile
    python -m benchmarks.gpu_session stress  --device cuda      # kernels off, memory, joins, a lost device, throughput
    python -m benchmarks.gpu_session report                     # OUT/gpu_session.md from the three JSON files

Sections fail alone: an error is recorded in place of a result, and the next section begins. Results are written after
every section. A call starts no section after its time is up. `--toy` runs all of it in a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contenders import Entry, Place, Rows, open_contender
from benchmarks.engine_sampler import EngineSampler
from benchmarks.networks import BenchNetwork, open_network, published, random_network
from benchmarks.options import add_place_options, exit_status, place_of, say
from benchmarks.reporting import describe_run, markdown_table
from diffusion.noise import STREAM_STEP, unchecked_normal
from interchange.published import PUBLISHED
from service.backends.base import BackendOptions
from service.backends.batch_sizes import close_sizes
from service.backends.cuda_graphs import CallAgain, Capture, CudaCapture
from service.backends.cuda_network import GroupNorm, fastest_group_norm, group_norm
from service.backends.cuda_queue import fastest_normal
from service.backends.device_queue import Normal
from service.backends.torch_backend import TorchBackend
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.request import GenerationRequest, ImageParams, ImageStatus, ImageStep, PlanKey
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics

BUDGET_S = 500.0
"""Time after which a call starts no further section."""
ADM = "adm-imagenet64"
LARGE = "adm-imagenet256"
SPOILED = 0.05
"""Probability that a slot is overwritten with NaN before a step."""
CALLS = ("lives", "time", "stress")
ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
LOSES_THE_DEVICE = """
import torch
from service.backends.cuda_errors import cuda_failure_kind
try:
    torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")].sum().item()
except Exception as error:
    print(type(error).__name__, cuda_failure_kind(error).name)
"""

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What all sections use."""

    place: Place
    network: BenchNetwork
    sizes: tuple[int, ...]
    """Batch sizes to time, ascending."""
    toy: bool

    @property
    def device(self) -> torch.device:
        """Device of all sections."""
        return self.place.device

    @property
    def on_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    def backend(self, width: int, **options: Any) -> TorchBackend:
        """Load the network as the service does."""
        return TorchBackend(self.network.checkpoint, BackendOptions(max_rows=width, device=str(self.device), **options))

    def seconds(self, work: Callable[[], object], calls: int = 20) -> float:
        """Return the median seconds of a call, after two calls that do not count."""
        taken = []
        for _ in range(2 if self.toy else calls + 2):
            self.place.wait()
            begun = time.perf_counter()
            work()
            self.place.wait()
            taken.append(time.perf_counter() - begun)
        return float(np.median(taken[-calls:]))

    def map_of(self, rows: int, channels: int = 64, size: int = 16) -> Tensor:
        """Return a feature map of noise, channels-last; a row does not depend on the number of rows."""
        shape = (channels, size, size)
        number = torch.arange(rows, device=self.device)
        x = unchecked_normal(number, number, number, STREAM_STEP, shape)
        return x.to(self.dtype, memory_format=torch.channels_last)


Section = Callable[[Session], Result]


# lives


def versions(session: Session) -> Result:
    """Return machine and versions."""
    facts: Result = dict(describe_run(session.device, session.place.threads))
    if session.on_cuda:
        facts |= {
            "capability": list(torch.cuda.get_device_capability(session.device)),
            "memory": torch.cuda.get_device_properties(session.device).total_memory,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "kernels": [_name(fastest_group_norm(session.device)), _name(fastest_normal(session.device))],
        }
    return facts


def product(session: Session) -> Result:
    """Measure the rate of a large product, in FLOP/s."""
    side = 256 if session.toy else 8192
    a, b = (torch.randn(side, side, device=session.device, dtype=session.dtype) for _ in range(2))
    return {"side": side, "flops": 2 * side**3 / session.seconds(lambda: a @ b)}


def bandwidth(session: Session) -> Result:
    """Measure a copy on the device, in bytes per second read and written."""
    values = torch.zeros(2**20 if session.toy else 2**30, dtype=torch.uint8, device=session.device)
    return {"bytes": len(values), "rate": 2 * len(values) / session.seconds(values.clone)}


def gpu_tests(session: Session) -> Result:
    """Run tests/gpu; without a GPU they are skipped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
        "-o",
        "filterwarnings=default",
    ]
    ran = subprocess.run(  # noqa: S603  # a fixed command
        command, capture_output=True, text=True, check=False, timeout=300
    )
    return {"status": ran.returncode, "tail": ran.stdout[-4000:]}


def operations(session: Session, norm: GroupNorm) -> Iterator[tuple[str, Callable[[int], Callable[[], Tensor]]]]:
    """Yield kinds of operations of a step by name: number of rows -> the work on fixed tensors."""
    weight = torch.linspace(0.5, 1.5, 64, device=session.device)
    conv = torch.randn(64, 64, 3, 3, device=session.device, dtype=session.dtype) / 24
    linear = torch.randn(192, 64, device=session.device, dtype=session.dtype) / 8

    def of_map(operation: Callable[[Tensor], Tensor]) -> Callable[[int], Callable[[], Tensor]]:
        return lambda rows: partial(operation, session.map_of(rows))

    def attention(backend: SDPBackend, x: Tensor) -> Tensor:
        tokens = F.linear(x.permute(0, 2, 3, 1).reshape(len(x), -1, 64), linear)
        q, k, v = (part.transpose(1, 2) for part in tokens.reshape(len(x), -1, 3, 2, 32).unbind(2))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    def noise(rows: int) -> Callable[[], Tensor]:
        number, normal = torch.arange(rows, device=session.device), fastest_normal(session.device)
        return lambda: normal(number, number, number, STREAM_STEP, (3, 16, 16))

    yield "convolution", of_map(lambda x: F.conv2d(x, conv, padding=1))
    yield "group norm", of_map(lambda x: norm(x, 32, weight, weight, 1e-5, silu=True))
    yield "tokens to q, k, v", of_map(lambda x: F.linear(x.permute(0, 2, 3, 1), linear))
    for backend in ATTENTION:
        yield f"attention {backend.name.lower()}", of_map(partial(attention, backend))
    yield "upsampling", of_map(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"))
    yield "pooling", of_map(lambda x: F.avg_pool2d(x, 2))
    yield "noise", noise


def captures(session: Session) -> Result:
    """Capture each kind of operation; return "equal", "differs" or the error, by name."""
    found: Result = {}
    for name, work_of in operations(session, fastest_group_norm(session.device)):
        try:
            with torch.inference_mode():
                work, capture = work_of(4), _capture(session)
                capture.warm_up(work)
                found[name] = "equal" if torch.equal(capture(work)(), work()) else "differs"
        except Exception as error:  # the next operation may work
            found[name] = _line(error)
    return found


def bits(session: Session) -> Result:
    """Return the batch sizes at which rows equal those of the largest, by kind of operation."""
    sizes = close_sizes(4 if session.toy else 64)
    found: Result = {"sizes": sizes}
    for name, work_of in operations(session, fastest_group_norm(session.device)):
        try:
            with torch.inference_mode():
                whole = work_of(sizes[-1])()
                found[name] = [size for size in sizes if torch.equal(work_of(size)(), whole[:size])]
        except Exception as error:  # a kind of attention that does not exist here
            found[name] = _line(error)
    return found


def self_test(session: Session) -> Result:
    """Return the batch sizes that the service would use for the network."""
    runner = ArrayRunner(session.backend(session.sizes[-1]), EngineConfig(max_rows=session.sizes[-1]))
    runner.warm_up()
    return {"sizes": runner.sizes.network}


# time


def network_calls(session: Session) -> Result:
    """Time calls of the network, by contender and rows, in seconds."""
    contenders = ("eager:bf16", "torch:bf16") if session.on_cuda else ("eager:fp32", "torch:fp32")
    found: Result = {"flops_per_row": session.network.flops}
    for name in contenders:
        for size in session.sizes:
            call = open_contender(
                Entry.parse(name), session.network, Rows.make(session.network.config, size), session.place
            )
            found[f"{name}, {size} rows"] = session.seconds(call)
            _free()
    return found


def compiled_calls(session: Session) -> Result:
    """Time one size of the compiled network, and how long it takes to compile, in seconds."""
    if not session.on_cuda:
        return {"skipped": "compiles for minutes"}
    size, begun = session.sizes[-1], time.perf_counter()
    rows = Rows.make(session.network.config, size)
    call = open_contender(Entry.parse("torch-compile:bf16"), session.network, rows, session.place)
    call()
    return {"rows": size, "compiling": time.perf_counter() - begun, "call": session.seconds(call)}


def steps(session: Session) -> Result:
    """Time entire steps of the service, launched one after the other without waiting, by rows, in seconds."""
    found: Result = {}
    for fused in (False, True) if session.on_cuda else (False,):
        width, calls = session.sizes[-1], 2 if session.toy else 20
        runner = ArrayRunner(session.backend(width, fuse_update=fused), EngineConfig(max_rows=width))
        runner.warm_up()
        for size in session.sizes:
            chains = [
                [ImageStep(slot=k, params=_image(k, calls + 2), step=s) for k in range(size)] for s in range(calls + 2)
            ]
            runner.start(chains[0])
            runner.launch(chains[0]).wait()
            runner.launch(chains[1]).wait()
            begun = time.perf_counter()
            pending = [runner.launch(chain) for chain in chains[2:]]
            for step in pending:
                step.wait()
            found[f"{'fused' if fused else 'plain'}, {size} rows"] = (time.perf_counter() - begun) / calls
        del runner
        _free()
    return found


def starts(session: Session) -> Result:
    """Time the start of new images, by number, in seconds."""
    width = session.sizes[-1]
    runner = ArrayRunner(session.backend(width), EngineConfig(max_rows=width))
    return {
        f"{size} images": session.seconds(
            partial(runner.start, [ImageStep(slot=k, params=_image(k, 2), step=0) for k in range(size)])
        )
        for size in session.sizes
    }


def profile(session: Session) -> Result:
    """Return the operations that take the most time in a call of the network: name, calls, microseconds."""
    backend = session.backend(session.sizes[-1])
    inputs = backend.zero_inputs(session.sizes[-1])
    backend(inputs)
    activity = torch.profiler.ProfilerActivity.CUDA if session.on_cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiled:
        backend(inputs)
        session.place.wait()
    name = "self_device_time_total" if session.on_cuda else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, name))
    return {"operations": [[event.key, event.count, getattr(event, name)] for event in events[:25]]}


# stress


def kernels(session: Session) -> Result:
    """Time the Triton kernels and PyTorch's operations on a large map and on the noise of a step, in seconds."""
    x, weight = session.map_of(session.sizes[-1], size=32), torch.ones(64, device=session.device)
    number, shape = torch.arange(session.sizes[-1], device=session.device), (3, 64, 64)
    norms: list[GroupNorm] = [group_norm]
    normals: list[Normal[Tensor]] = [unchecked_normal]
    if session.on_cuda:
        norms.append(fastest_group_norm(session.device))
        normals.append(fastest_normal(session.device))
    found: Result = {}
    for norm in norms:
        found[_name(norm)] = session.seconds(partial(norm, x, 32, weight, weight, 1e-5, silu=True))
    for normal in normals:
        found[_name(normal)] = session.seconds(partial(normal, number, number, number, STREAM_STEP, shape))
    return found


def out_of_memory(session: Session) -> Result:
    """Load the network while almost all memory is taken: sizes without memory must run without graphs."""
    if not session.on_cuda:
        return {"skipped": "needs a GPU"}
    backend = session.backend(session.sizes[-1])
    with torch.inference_mode():
        backend(backend.zero_inputs(session.sizes[-1]))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(session.device)
    taken = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device=session.device)
    try:
        runner = ArrayRunner(backend, EngineConfig(max_rows=session.sizes[-1]))
        runner.warm_up()
        return {"captured": [size for size in runner.sizes.network if not runner.is_uncaptured(size)]}
    finally:
        del taken


def joins(session: Session) -> Result:
    """Let images join, leave, be cancelled, evicted and spoiled by NaN for a minute; compare each with itself alone."""
    config = EngineConfig(max_rows=session.sizes[-1], slots_per_row=1, timed_calls=0)
    runner = ArrayRunner(session.backend(config.max_rows), config)
    runner.warm_up()
    draw, together = np.random.default_rng(0), dict[int, bytes]()
    engine = Engine({"m": runner}, config, Metrics())
    images = [
        replace(
            _image(k, int(draw.integers(2, 12))), class_index=0 if session.network.config.model.num_classes else None
        )
        for k in range(8 if session.toy else 400)
    ]
    until, added, cancelled, spoiled = time.monotonic() + 60, 0, 0, 0
    failed = set[str]()
    while engine.has_work() or (added < len(images) and time.monotonic() < until):
        for _ in range(int(draw.integers(0, 4))):
            if added < len(images):
                engine.add(GenerationRequest(request_id=str(added), model="m", images=(images[added],)), 0.0)
                added += 1
        if added and draw.random() < 0.1:
            cancelled += len(engine.abort(str(draw.integers(added))))
        if engine.has_work() and draw.random() < SPOILED:
            runner.slots.x[int(draw.integers(config.num_slots))] = torch.nan
            spoiled += 1
        for result in engine.step() if engine.has_work() else ():
            if result.status is ImageStatus.FAILED:
                failed.add(result.request_id)
            if result.pixels is not None:
                together[int(result.request_id)] = result.pixels.tobytes()
    different = [k for k in list(together)[:100] if _alone(runner, config, images[k]) != together[k]]
    return {
        "images": len(together),
        "cancelled": cancelled,
        "spoiled": spoiled,  # a slot without an image is harmless
        "failed": len(failed),
        "different": different,
    }


def lost_device(session: Session) -> Result:
    """Cause an error of the device in a process of its own, and report its type and kind."""
    if not session.on_cuda:
        return {"skipped": "needs a GPU"}
    ran = subprocess.run(  # noqa: S603  # a fixed command
        [sys.executable, "-c", LOSES_THE_DEVICE], capture_output=True, text=True, check=False, timeout=120
    )
    return {"reported": ran.stdout.strip(), "stderr": ran.stderr[-500:]}


def two_models(session: Session) -> Result:
    """Take steps of two models in turns on one device."""
    config = EngineConfig(max_rows=session.sizes[-1], timed_calls=0)
    runners = {name: ArrayRunner(session.backend(config.max_rows), config) for name in ("a", "b")}
    engine = Engine(dict(runners), config, Metrics())
    engine.warm_up()
    for name in runners:
        engine.add(GenerationRequest(request_id=name, model=name, images=(_image(1, 3),)), 0.0)
    pixels = []
    while engine.has_work():
        pixels += [result.pixels.tobytes() for result in engine.step() if result.pixels is not None]
    return {"images": len(pixels), "equal": len(set(pixels)) == 1}


def large_start(session: Session) -> Result:
    """Load a network of 256x256 images with random weights as the service does, 16 rows wide: seconds and memory."""
    if not session.on_cuda:
        return {"skipped": "minutes on a CPU"}
    network = random_network(LARGE, published(LARGE), session.network.checkpoint.parent)
    torch.cuda.reset_peak_memory_stats(session.device)
    begun, width = time.perf_counter(), 16
    options = BackendOptions(max_rows=width, device=str(session.device))
    runner = ArrayRunner(TorchBackend(network.checkpoint, options), EngineConfig(max_rows=width))
    loaded = time.perf_counter()
    runner.warm_up()
    return {
        "loading": loaded - begun,
        "warm_up": time.perf_counter() - loaded,
        "captured": [size for size in runner.sizes.network if not runner.is_uncaptured(size)],
        "peak_memory": torch.cuda.max_memory_allocated(session.device),
    }


def throughput(session: Session) -> Result:
    """Measure images per second of the engine, 50 steps each, all images waiting at once."""
    count, chain = (2, 2) if session.toy else (4 * session.sizes[-1], 50)
    sampler = EngineSampler(session.backend(session.sizes[-1]), session.sizes[-1])
    begun = time.perf_counter()
    sampler(chain, [0 if session.network.config.model.num_classes else None] * count)
    return {"images": count, "steps": chain, "rate": count / (time.perf_counter() - begun)}


SECTIONS: dict[str, tuple[Section, ...]] = {
    "lives": (versions, product, bandwidth, captures, bits, self_test, gpu_tests),
    "time": (network_calls, steps, starts, profile, compiled_calls),
    "stress": (kernels, joins, two_models, large_start, throughput, out_of_memory, lost_device),
}


def run_call(name: str, session: Session, out: Path, budget_s: float = BUDGET_S) -> dict[str, Result]:
    """Run the sections of a call; write OUT/gpu_session_NAME.json after each."""
    begun, found = time.monotonic(), dict[str, Result]()
    for section in SECTIONS[name]:
        title, started = section.__name__, time.monotonic()
        if started - begun > budget_s:
            found[title] = {"skipped": "the time was up"}
        else:
            say(f"{name}: {title}")
            try:
                found[title] = section(session)
            except Exception as error:  # sections fail alone
                found[title] = {"error": _line(error), "trace": traceback.format_exc()[-2000:]}
            found[title] |= {"seconds": round(time.monotonic() - started, 2)}
            _free()
        path = out / f"gpu_session_{name}.json"
        partial_path = path.with_suffix(".part")
        partial_path.write_text(json.dumps(found, indent=1, default=list), encoding="utf-8")
        Path(partial_path).replace(path)
    return found


def report(out: Path) -> str:
    """Return the results of all calls that were made, in markdown."""
    lines = []
    for name in CALLS:
        path = out / f"gpu_session_{name}.json"
        if not path.exists():
            lines += [f"### {name}", "", "Not run.", ""]
            continue
        for title, result in json.loads(path.read_text(encoding="utf-8")).items():
            rows = [(key, _shown(value)) for key, value in result.items() if key != "trace"]
            lines += [f"### {name}: {title}", "", markdown_table(("", "result"), rows), ""]
    return "\n".join(lines)


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", repr(function))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _capture(session: Session) -> Capture:
    return CudaCapture(session.device) if session.on_cuda else CallAgain()


def _image(seed: int, chain: int) -> ImageParams:
    plan = PlanKey(sampler="ancestral", spec=str(chain))
    return ImageParams(plan=plan, num_steps=chain, seed=seed, image_index=0, class_index=None, cfg_scale=1.0)


def _alone(runner: ArrayRunner[Any], config: EngineConfig, image: ImageParams) -> bytes:
    engine = Engine({"m": runner}, config, Metrics())
    engine.add(GenerationRequest(request_id="r", model="m", images=(image,)), 0.0)
    pixels = b""
    while engine.has_work():
        for result in engine.step():
            pixels += b"" if result.pixels is None else result.pixels.tobytes()
    return pixels


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a call, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=(*CALLS, "report"))
    parser.add_argument("--network", default=ADM, help=f"a network of denoise_step, or a published one ({ADM})")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="batch sizes (1 8 64)")
    parser.add_argument("--toy", action="store_true", help="the bundled model, few rows, few calls")
    add_place_options(parser)
    return exit_status(_run, parser.parse_args(arguments))


def _run(asked: argparse.Namespace) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.call == "report":
        (asked.out / "gpu_session.md").write_text(report(asked.out), encoding="utf-8")
        return
    name, sizes = ("fashion32", (1, 2)) if asked.toy else (asked.network, tuple(sorted(asked.rows)))
    network = random_network(name, published(name), asked.work) if name in PUBLISHED else open_network(name, asked.work)
    session = Session(place=place_of(asked), network=network, sizes=sizes, toy=asked.toy)
    run_call(asked.call, session, asked.out)


if __name__ == "__main__":
    sys.exit(main())
