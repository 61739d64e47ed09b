"""Measure requests under load: the service over HTTP against servers that batch requests or do not batch.

    python -m benchmarks.serving --loads 0.8 1.3 --seeds 1 2 3 --venvs build/venvs    # measure, then report
    python -m benchmarks.serving --report                                             # report what was measured
    python -m benchmarks.serving --quick                                              # half a minute, no other venvs

Open loop: requests arrive as a Poisson process (`benchmarks.traffic`), the same for every server. Load is offered
row-steps per second over W / c(W): W rows per network call at most, c(n) the median time of a call with n rows, timed
before each round. A machine may change its speed within minutes, so the report also has goodput and load relative to
the duration of full calls in the run's own window; on a simulated device (--device sleep) both are the same, and
measure the server independently of the machine. All servers run the artifact through the service's OpenVINO backend
with the same precision, static batch sizes and threads (except diffusers, which uses PyTorch), one network call at a
time; their pixels are compared before the measurement. They take turns: a round is a load and a seed, and each starts
with another server; waiting servers are suspended. Every run is appended to serving.jsonl in the folder --out, so that
a long comparison can be measured in parts; the report covers the entire file.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch

from benchmarks.contenders import Absent
from benchmarks.networks import open_network
from benchmarks.open_loop import PATIENCE_S, PLAIN, Answer, offer, open_client
from benchmarks.options import WORK, exit_status, say
from benchmarks.peers.simulated_device import SimulatedDevice
from benchmarks.reporting import describe_run
from benchmarks.servers import KINDS, Entry, Server, Site, started
from benchmarks.serving_record import Mark, Run, append_run, read_runs
from benchmarks.serving_report import write_report
from benchmarks.traffic import MIX, Arrival, draw_arrivals
from diffusion.network_inputs import NetworkInputs
from diffusion.noise import STREAM_X_T, normal
from service.backends.base import BackendOptions
from service.backends.openvino_backend import OpenVinoBackend

DEFAULT_SERVERS = ("iddpm", "triton", "litserve", "one-at-a-time")
QUICK_SERVERS = ("iddpm", "one-at-a-time")
QUICK_MIX = {2: 0.5, 4: 0.3, 10: 0.2}
TIMED_CALLS, QUICK_TIMED_CALLS = 150, 3
"""Calls of each size before a round: seconds of them, because the speed of a shared machine varies."""
WARM_UP = 0.25
"""Fraction of a run before its rate and the network's busy time are measured."""


def time_network(backend: OpenVinoBackend, calls: int) -> dict[int, float]:
    """Return the median seconds of a network call by rows, measured in turns."""
    model = backend.config.model
    shape = model.image_shape
    taken: dict[int, list[float]] = {rows: [] for rows in backend.batch_sizes or ()}
    for _ in range(calls):
        for rows, seconds in taken.items():
            zeros = np.zeros(rows, dtype=np.int64)
            x_t, emb_t = normal(zeros, zeros, zeros, STREAM_X_T, shape), backend.embed_timesteps(np.full(rows, 500.0))
            begun = time.perf_counter()
            backend(NetworkInputs(x_t, emb_t, zeros))
            seconds.append(time.perf_counter() - begun)
    return {rows: float(np.median(seconds)) for rows, seconds in taken.items()}


async def measure(server: Server, arrivals: Sequence[Arrival], seconds: float) -> tuple[list[Answer], list[Mark]]:
    """Put a server under load, until all requests are answered."""
    async with open_client(server.url) as client:
        marks: list[Mark] = []
        begun = time.perf_counter()

        async def mark() -> None:
            reading = await server.read(client)
            marks.append(Mark(time.perf_counter() - begun, reading))

        await mark()
        begun = time.perf_counter()
        looks = [(WARM_UP * seconds, mark), (seconds, mark)]
        answers = await offer(client, arrivals, server.entry.kind.ask, looks)
        await mark()
        return answers, marks


def check_pixels(servers: Sequence[Server], steps: int) -> None:
    """Request the same images from every server and compare the pixels: only the serving may differ.

    Raises:
        ValueError: the pixels of a server differ from the first one's.
    """
    expected = None
    for server in servers:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=PLAIN, trust_env=False) as client:
            pixels = server.picture(client, Arrival(0.0, steps, 2))
        if server.entry.kind.diffusers:
            continue
        if expected is not None and not np.array_equal(pixels, expected):
            raise ValueError(f"the pixels of {server.entry.text} differ from those of {servers[0].entry.text}")
        expected = pixels


# --- The command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Measure, then write the report.

    Raises:
        ValueError: invalid options; the message gives the remedy.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "serving.jsonl"
    if not args.report:
        compare(args, record)
    write_report(args.out, read_runs(record))
    print((args.out / "serving.md").read_text(encoding="utf-8"), end="")


def compare(args: argparse.Namespace, record: Path) -> None:
    """Start the servers, and measure them in turns."""
    mix = QUICK_MIX if args.quick else MIX
    device_ms = (args.device_ms[0], args.device_ms[1]) if args.device == "sleep" else None
    site = Site(
        network=open_network("fashion32", args.work),
        work=args.out / "servers",
        width=args.width,
        threads=args.threads,
        device_ms=device_ms,
        steps=tuple(mix),
        venvs={kind.venv: args.venvs / kind.venv for kind in KINDS.values() if kind.venv is not None},
    )
    facts = describe_run(torch.device("cpu"), args.threads)
    options = BackendOptions(max_rows=args.width, threads=args.threads, device="cpu")
    network: OpenVinoBackend | SimulatedDevice
    if device_ms is None:
        network = OpenVinoBackend(site.network.checkpoint, options)
    else:
        network = SimulatedDevice(site.network.checkpoint, options, *device_ms)
    facts["Device"] = network.description
    entries = [Entry.parse(text) for text in args.servers or (QUICK_SERVERS if args.quick else DEFAULT_SERVERS)]
    with ready_servers(entries, site) as servers:
        for seed in args.seeds:
            for load in args.loads:
                if isinstance(network, SimulatedDevice):
                    costs = network.costs
                else:
                    costs = time_network(network, QUICK_TIMED_CALLS if args.quick else TIMED_CALLS)
                for done in take_round(servers, costs, load, seed, args.seconds, mix, facts):
                    append_run(record, done)


@contextmanager
def ready_servers(entries: Sequence[Entry], site: Site) -> Iterator[list[Server]]:
    """Start servers, check that their pixels are equal, and suspend them; omit servers that do not start."""
    with ExitStack() as stack:
        servers = []
        for number, entry in enumerate(entries):
            try:
                servers.append(stack.enter_context(started(entry, site, number)))
            except Absent as reason:
                say(f"{entry.text} takes no part: {reason}")
        for server in [*servers]:
            try:
                server.wait_ready(site.steps)
            except Absent as reason:
                say(str(reason))
                servers.remove(server)
        check_pixels(servers, min(site.steps))
        for server in servers:
            server.suspend()
        yield servers


def take_round(
    servers: Sequence[Server],
    costs: Mapping[int, float],
    load: float,
    seed: int,
    seconds: float,
    mix: Mapping[int, float],
    facts: Mapping[str, str],
) -> Iterator[Run]:
    """Put each server under the same load, with the others suspended; the network was timed before."""
    width = max(costs)
    arrivals = draw_arrivals(load * width / costs[width], seconds, seed, mix)
    first = seed % len(servers)
    for server in [*servers[first:], *servers[:first]]:
        say(f"load {load}, seed {seed}: {server.entry.text}, {len(arrivals)} requests")
        server.resume()
        answers, marks = asyncio.run(measure(server, arrivals, seconds))
        server.suspend()
        yield Run(
            server=server.entry.text,
            load=load,
            seed=seed,
            seconds=seconds,
            width=width,
            costs=costs,
            answers=answers,
            marks=marks,
            facts=facts,
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="iddpm and one-at-a-time, chains of at most 10 steps")
    parser.add_argument("--report", action="store_true", help="only write the report of earlier measurements")
    parser.add_argument(
        "--servers", nargs="+", metavar="KIND[,NAME=VALUE]", help=f"of {', '.join(KINDS)} ({' '.join(DEFAULT_SERVERS)})"
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.3], help="(0.8 1.3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="one round each per load (1)")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds in which requests arrive in a run (60)")
    parser.add_argument("--width", type=int, default=8, help="maximum rows of a network call (8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a network call (1)")
    parser.add_argument(
        "--device", choices=("network", "sleep"), default="network", help="sleep: simulate one (all but diffusers)"
    )
    parser.add_argument(
        "--device-ms",
        type=float,
        nargs=2,
        metavar=("FIXED", "ROW"),
        default=(7.0, 1.0),
        help="what a call of n rows takes on the simulated device: FIXED + ROW * n (7 1)",
    )
    parser.add_argument("--venvs", type=Path, default=Path("build/venvs"), help="folder of the peers' (build/venvs)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"folder for networks and artifacts ({WORK})")
    parser.add_argument("--out", type=Path, default=WORK / "serving", help=f"folder for results ({WORK / 'serving'})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that the servers are ended
    sys.exit(exit_status(run, parse_arguments()))
