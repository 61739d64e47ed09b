"""Servers of a benchmark as processes: a port for each, and an end for all that they have started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess


def free_ports(count: int = 1) -> int:
    """Return the first of so many free ports in a row, on loopback."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for other in range(port + 1, port + count):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", other))
            except OSError:
                continue
            return port


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started with `start_new_session`, and all that it has started, which some leave behind."""
    try:
        for numbers in ((signal.SIGCONT, signal.SIGTERM), (signal.SIGKILL,)):
            for number in numbers:
                os.killpg(process.pid, number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
    except ProcessLookupError:
        process.wait()
