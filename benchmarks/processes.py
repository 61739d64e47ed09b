"""Manage the server processes of a benchmark: find free ports, and end process groups."""

from __future__ import annotations

import os
import signal
import socket
import subprocess


def free_ports(count: int = 1) -> int:
    """Return the first of `count` consecutive free ports on loopback."""
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
    """End a process that was started with `start_new_session`, and all its child processes."""
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
