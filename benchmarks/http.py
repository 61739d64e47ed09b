"""Measure the cost of HTTP: the service around a network that does nothing, a bare FastAPI app, and LitServe.

    python -m benchmarks.http --litserve-python path/to/its/venv/bin/python --ray

Each server is a separate process on a loopback port, restarted for every repeat, in turns. A request is for one
image of 32 x 32 pixels and 2 steps; FastAPI and LitServe have no engine and answer with a prepared picture, so
they show the cost without the service's own work. Measured from this process, over connections that
stay open:

- alone: the latency of sequential requests; for the service also without its engine steps, which is the overhead of
  HTTP,
  admission, the engine's queue, encoding and the response (goal: 5 ms);
- loaded: requests per second, and their latency, with each number of `--clients` requests always in flight, in turn;
- CPU ms: processor time of the server for a request of that load, in all its processes; unlike the others it hardly
  depends on what else runs on the machine;
- loop lag under that load: how late a sleep of 5 ms returns in the server's event loop (goal: 99 % below 20 ms). The
  service is also measured with pictures of 64 x 64 pixels, whose encoding takes longer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.options import WORK
from benchmarks.processes import end_session, free_ports
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish

HERE = Path(__file__).parent / "null_servers"
BODY = json.dumps({"steps": 2, "seed": 1}).encode()
WARM_UP = 50


@dataclass(frozen=True)
class Contender:
    """How a server is started: command, port, arguments."""

    name: str
    command: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    has_engine: bool = False
    has_lag: bool = True


@dataclass(frozen=True)
class Loaded:
    """What a number of requests in flight gave."""

    per_second: float
    ms: tuple[float, ...]
    cpu_ms: float
    """Processor time of all processes of the server, per request."""
    lag_ms: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """Results of one repeat."""

    alone_ms: tuple[float, ...]
    engine_ms: float
    """Mean time of a lone request's engine steps; 0 without an engine."""
    loaded: Mapping[int, Loaded]
    """By number of requests in flight."""


class Connection:
    """A minimal HTTP/1.1 client over one persistent connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        self._reader = reader
        self._writer = writer
        self._host = f"Host: 127.0.0.1:{port}\r\n".encode()

    async def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request and return the answer's body.

        Raises:
            RuntimeError: the answer is not 200.
        """
        head = f"{method} {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode() + self._host + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status, *lines = answer.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        content = await self._reader.readexactly(length)
        if b" 200" not in status:
            raise RuntimeError(f"{method} {path}: {status.decode()} {content[:200]!r}")
        return content

    def close(self) -> None:
        """Close it."""
        self._writer.close()

    async def closed(self) -> None:
        """Close it, and wait until that is done."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def connect(port: int) -> Connection:
    """Open a connection."""
    return Connection(*await asyncio.open_connection("127.0.0.1", port), port)


@asynccontextmanager
async def started(contender: Contender, log: Path) -> AsyncIterator[tuple[int, int]]:
    """Start a server and wait until it is ready; yields its port and its session."""
    port = free_ports()
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # a program of this repository, or the named Python
            [*contender.command, str(port), *contender.arguments],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{contender.name} did not start; see {log}")
            try:
                connection = await connect(port)
                await connection.ask("GET", "/readyz")
                break
            except (OSError, RuntimeError, asyncio.IncompleteReadError):
                await asyncio.sleep(0.1)
        connection.close()
        yield port, process.pid
    finally:
        end_session(process)


async def measure(contender: Contender, log: Path, alone: int, clients: Sequence[int], seconds: float) -> Measured:
    """Start a server, send sequential requests, then concurrent ones."""
    async with started(contender, log) as (port, session):
        connection = await connect(port)
        for _ in range(WARM_UP):
            await connection.ask("POST", "/v1/generate", BODY)
        before = await _engine_seconds(connection) if contender.has_engine else 0.0
        alone_ms = [await _timed(connection) for _ in range(alone)]
        steps_s = await _engine_seconds(connection) - before if contender.has_engine else 0.0
        loaded = {count: await _load(contender, connection, (port, session), count, seconds) for count in clients}
        connection.close()
    return Measured(tuple(alone_ms), 1000 * steps_s / alone, loaded)


async def _load(
    contender: Contender, idle: Connection, server: tuple[int, int], clients: int, seconds: float
) -> Loaded:
    """Keep a number of requests in flight; `server` is its port and its session."""
    port, session = server
    if contender.has_lag:
        await idle.ask("GET", "/lag")
    connections = [await connect(port) for _ in range(clients)]
    ms: list[float] = []
    cpu_s = session_cpu_seconds(session)
    begun = time.perf_counter()

    async def keep_asking(mine: Connection) -> None:
        while time.perf_counter() - begun < seconds:
            ms.append(await _timed(mine))

    await asyncio.gather(*map(keep_asking, connections))
    took = time.perf_counter() - begun
    cpu_s = session_cpu_seconds(session) - cpu_s
    lag_ms = json.loads(await idle.ask("GET", "/lag")) if contender.has_lag else []
    for one in connections:
        one.close()
    return Loaded(len(ms) / took, tuple(ms), 1000 * cpu_s / len(ms), tuple(lag_ms))


def session_cpu_seconds(session: int) -> float:
    """Return the processor seconds of all processes of a session that have not ended."""
    total = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def _timed(connection: Connection) -> float:
    begun = time.perf_counter()
    await connection.ask("POST", "/v1/generate", BODY)
    return 1000 * (time.perf_counter() - begun)


async def _engine_seconds(connection: Connection) -> float:
    text = (await connection.ask("GET", "/metrics")).decode()
    families = text_string_to_metric_families(text)
    samples = (sample for family in families for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == "iddpm_engine_step_seconds_sum")


def tables(results: Mapping[str, Sequence[Measured]]) -> str:
    """Write a table of requests alone and one under load: median, minimum and maximum of the repeats."""

    def spread(values: Sequence[float], digits: int = 2) -> str:
        return f"{np.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    def quantile(values: Sequence[Sequence[float]], part: float) -> str:
        return spread([float(np.percentile(one, part)) for one in values]) if values[0] else "-"

    alone_rows, loaded_rows = [], []
    for name, repeats in results.items():
        alone = [one.alone_ms for one in repeats]
        beyond = [[ms - one.engine_ms for ms in one.alone_ms] for one in repeats] if repeats[0].engine_ms else [[]]
        alone_rows.append([name, quantile(alone, 50), quantile(beyond, 50), quantile(beyond, 99)])
        for clients in repeats[0].loaded:
            loaded = [one.loaded[clients] for one in repeats]
            loaded_rows.append(
                [
                    name,
                    str(clients),
                    spread([one.per_second for one in loaded], 0),
                    quantile([one.ms for one in loaded], 50),
                    quantile([one.ms for one in loaded], 99),
                    spread([one.cpu_ms for one in loaded]),
                    quantile([one.lag_ms for one in loaded], 99),
                ]
            )
    alone_header = ("server", "alone ms p50", "without engine steps p50", "p99")
    loaded_header = ("server", "in flight", "requests/s", "ms p50", "ms p99", "CPU ms", "loop lag ms p99")
    return f"{markdown_table(alone_header, alone_rows)}\n\n{markdown_table(loaded_header, loaded_rows)}"


def contenders(litserve_python: Path | None, ray: bool = False) -> list[Contender]:
    """Name the servers that can be started.

    Args:
        litserve_python: Python with LitServe; None: without it.
        ray: whether to include the service in Ray Serve (extra ray).
    """
    ours = (sys.executable, "-m", "benchmarks.null_servers.iddpm_server")
    found = [
        Contender("iddpm", ours, has_engine=True),
        Contender("FastAPI alone", (sys.executable, "-m", "benchmarks.null_servers.fastapi_server")),
        Contender("iddpm, 64 x 64", ours, ("64",), has_engine=True),
    ]
    if litserve_python is not None:
        program = str(HERE / "litserve_server.py")
        found.insert(2, Contender("LitServe", (str(litserve_python), program), has_lag=False))
    if ray:
        in_ray = (sys.executable, "-m", "benchmarks.null_servers.ray_server")
        found.append(Contender("iddpm in Ray Serve", in_ray, has_engine=True))
    return found


def main() -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", type=int, default=200, help="sequential requests (200)")
    parser.add_argument("--clients", type=int, nargs="+", default=[16], help="requests in flight under load (16)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of each load (2)")
    parser.add_argument("--litserve-python", type=Path, help="Python with LitServe installed; omitted if not given")
    parser.add_argument("--ray", action="store_true", help="include the service in Ray Serve (extra ray)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the servers to measure (all)")
    parser.add_argument("--out", type=Path, default=WORK)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    facts = describe_run(torch.device("cpu"), threads=1)
    facts["Load"] = f"median (minimum-maximum) of {asked.repeats} repeats, in turns"
    results: dict[str, list[Measured]] = {}
    for _ in range(asked.repeats):
        for contender in contenders(asked.litserve_python, asked.ray):
            if asked.only and contender.name not in asked.only:
                continue
            measured = asyncio.run(
                measure(contender, asked.out / "http.log", asked.alone, asked.clients, asked.seconds)
            )
            results.setdefault(contender.name, []).append(measured)
    section = markdown_section(facts, tables(results), "benchmarks.http")
    publish(asked.out, "http", section)


if __name__ == "__main__":
    main()
