"""Measure how many requests per second one core forwards with HAProxy and the configuration of deploy/haproxy.

    python -m benchmarks.proxy_rate

HAProxy stands in front of a server that answers at once, on loopback. Clients, server and proxy share the machine, so
that the rate of the clients would say little. Measured is the processor time that HAProxy's process used per request,
in user and system mode; a core that does nothing else forwards one over that. Each round runs every case in turn:

- answers of 500 bytes, such as errors and lists, and of 1 MB, such as several pictures;
- a connection per request on both sides, as configured, and connections that are kept (without `option httpclose`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.contenders import Absent
from benchmarks.haproxy import haproxy
from benchmarks.http import connect
from benchmarks.options import WORK, exit_status, say
from benchmarks.processes import end_session
from benchmarks.reporting import describe_run, markdown_section, markdown_table, publish

ROOT = Path(__file__).parents[1]
BODY = json.dumps({"steps": 50, "seed": 1}).encode()
CLOSE = "    option httpclose\n"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """Kind of traffic."""

    name: str
    size: int
    """Bytes of an answer."""
    kept: bool
    """Connections are kept on both sides."""
    requests: int


SMALL, LARGE = 500, 1_000_000
CASES = (
    Case("500 bytes, connection per request", SMALL, kept=False, requests=8000),
    Case("500 bytes, kept connections", SMALL, kept=True, requests=8000),
    Case("1 MB, connection per request", LARGE, kept=False, requests=1000),
    Case("1 MB, kept connections", LARGE, kept=True, requests=1000),
)


def keep_connections(config: str) -> str:
    """Remove the option that closes a connection after its request.

    Raises:
        ValueError: the configuration does not have it.
    """
    if config.count(CLOSE) != 1:
        raise ValueError(f"deploy/haproxy/haproxy.cfg must have the line {CLOSE.strip()!r} once")
    return config.replace(CLOSE, "")


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its threads so far, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def send(port: int, requests: int, clients: int, *, kept: bool) -> None:
    """Send requests, always `clients` of them at a time.

    Raises:
        RuntimeError: an answer is not 200.
    """
    left = iter(range(requests))

    async def ask_in_turn() -> None:
        connection = await connect(port)
        try:
            for number, _ in enumerate(left):
                if number and not kept:
                    await connection.closed()
                    connection = await connect(port)
                await connection.ask("POST", "/v1/generate", BODY)
        finally:
            await connection.closed()

    await asyncio.gather(*(ask_in_turn() for _ in range(clients)))


async def _until_forwarded(port: int) -> None:
    deadline = asyncio.get_running_loop().time() + START_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        try:
            return await send(port, 1, 1, kept=False)
        except (RuntimeError, OSError, asyncio.IncompleteReadError):  # 503 until the server's health has been checked
            await asyncio.sleep(0.1)
    raise Absent(f"HAProxy forwarded no request within {START_SECONDS:g} s")


def measure(program: str, case: Case, clients: int, work: Path) -> float:
    """Return HAProxy's processor seconds per request.

    Raises:
        Absent: it forwards nothing.
        RuntimeError: an answer is not 200.
    """
    work.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = subprocess.Popen(  # noqa: S603  # a program of this repository
            [sys.executable, "-m", "benchmarks.null_servers.fixed_server", str(listener.fileno()), str(case.size)],
            cwd=ROOT, start_new_session=True, pass_fds=[listener.fileno()],
        )  # fmt: skip
    try:
        edit = keep_connections if case.kept else str
        with haproxy(program, work, [port], edit=edit) as proxy:
            port = int(proxy.url.rpartition(":")[2])
            asyncio.run(_until_forwarded(port))
            before = processor_seconds(proxy.pid)
            asyncio.run(send(port, case.requests, clients, kept=case.kept))
            return (processor_seconds(proxy.pid) - before) / case.requests
    finally:
        end_session(server)


def table(measured: Sequence[Sequence[float]]) -> str:
    """Return a table with a row per case.

    Args:
        measured: processor seconds per request of each round, by case.
    """
    rows = []
    for case, seconds in zip(CASES, measured, strict=True):
        middle = statistics.median(seconds)
        per_s = 1 / middle
        spread = f"{1e6 * min(seconds):.0f} to {1e6 * max(seconds):.0f}"
        rows.append((case.name, f"{1e6 * middle:.0f}", spread, f"{per_s:,.0f}", f"{per_s * case.size / 1e6:,.0f}"))
    return markdown_table(
        ("answers", "CPU µs per request: median", "all rounds", "**requests/s of a core**", "MB/s of a core"), rows
    )


def main() -> None:
    """Print the table, and write it as a section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, help="requests in flight (16)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--out", type=Path, default=WORK)
    raise SystemExit(exit_status(run, parser.parse_args()))


def run(asked: argparse.Namespace) -> None:
    """Measure what was asked for.

    Raises:
        Absent: HAProxy is not installed.
    """
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise Absent("haproxy is not installed")
    facts = describe_run(torch.device("cpu"), threads=os.cpu_count() or 1)
    version = subprocess.run([program, "-v"], capture_output=True, text=True, check=True)  # noqa: S603  # HAProxy
    facts["HAProxy"] = version.stdout.split()[2]
    facts["Clients"] = f"{asked.clients} requests in flight; {asked.rounds} rounds of all cases in turn"
    rounds = []
    for number in range(asked.rounds):
        rounds.append([measure(program, case, asked.clients, asked.out / "proxy") for case in CASES])
        say(f"round {number + 1}: " + ", ".join(f"{1e6 * seconds:.0f} µs" for seconds in rounds[-1]))
    section = markdown_section(facts, table(list(zip(*rounds, strict=True))), "benchmarks.proxy_rate")
    publish(asked.out, "proxy_rate", section)


if __name__ == "__main__":
    main()
