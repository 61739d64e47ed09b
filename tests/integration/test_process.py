"""How the process handles its log, its file descriptors and its signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.integration.exact_process import serving, status_of, wait_for
from tests.programs import tool
from tests.waiting import PATIENCE_S

DESCRIPTORS = 40
CONNECTIONS = 120
LONG_NOTICE = {**os.environ, "IDDPM_DRAIN_NOTICE_S": "3600"}


def test_an_unread_log_delays_neither_answers_nor_shutdown() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"." * 4096)
    os.set_blocking(writing, True)

    def ignore_hangup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    with serving(writing, preexec_fn=ignore_hangup) as (process, url):
        wait_for(process, f"{url}/readyz", 200)
        process.send_signal(signal.SIGHUP)
        assert [status_of(f"{url}/{path}") for path in ("v1/models", "healthz", "readyz")] == [200] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    os.close(reading)
    os.close(writing)


def test_health_and_log_work_without_free_file_descriptors_and_sighup_drains(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"

    def limit_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104  # reachable by IPv4
    with (
        log.open("wb") as output,
        serving(output, host, preexec_fn=limit_descriptors) as (process, url),
        ExitStack() as open_ones,
    ):
        wait_for(process, f"{url}/readyz", 200)
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(CONNECTIONS):
            open_ones.enter_context(socket.create_connection(address))
        for _ in range(10):
            assert status_of(f"{url}/healthz") == 200
        assert httpx.post(f"{url}/v1/generate", json={"steps": 2}, timeout=PATIENCE_S).status_code == 200
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE_S) == 0
    lines = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert len(lines) < 50
    assert any(line.endswith("idle ones are closed for new ones") for line in lines)
    assert "SIGHUP: finishing accepted requests, refusing new ones" in lines


def test_an_idle_service_answers_503_for_a_while_after_sigterm_so_that_proxies_notice() -> None:
    with serving(subprocess.DEVNULL, env=LONG_NOTICE) as (process, url):
        wait_for(process, f"{url}/readyz", 200)
        process.send_signal(signal.SIGTERM)
        wait_for(process, f"{url}/readyz", 503)
        for _ in range(3):
            assert httpx.post(f"{url}/v1/generate", json={"steps": 2}, timeout=PATIENCE_S).status_code == 503
            assert status_of(f"{url}/v1/models") == 200
        process.send_signal(signal.SIGTERM)  # again: nothing is lost
        assert process.wait(PATIENCE_S) == 0


def test_ctrl_c_ends_an_idle_service_without_waiting_for_proxies() -> None:
    with serving(subprocess.DEVNULL, env=LONG_NOTICE) as (process, url):
        wait_for(process, f"{url}/readyz", 200)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0


def test_a_signal_while_the_network_warms_up_ends_the_process_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output, serving(output, seconds=10 * PATIENCE_S) as (process, url):
        wait_for(process, f"{url}/readyz", 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert "SIGTERM during start-up: ending; nothing was accepted yet" in log.read_text()


PROCESS_1 = """
import ctypes, os, subprocess, sys
from cli.process_one import let_sigterm_end_process_1

assert os.getpid() == 1
let_sigterm_end_process_1()
subprocess.run([sys.executable, "-c", "import os; os.kill(1, 15)"])
ctypes.CDLL(None).sleep(300)  # where no handler of Python's would run
"""


def test_sigterm_ends_process_1_like_any_other() -> None:
    unshare = [tool("unshare"), "--pid", "--fork", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no new process namespaces")
    ended = subprocess.run([*unshare, sys.executable, "-c", PROCESS_1], timeout=PATIENCE_S, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
