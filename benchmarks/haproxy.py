"""HAProxy on loopback, with the files of deploy/haproxy; only the addresses are replaced. The tests use it too."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "deploy" / "haproxy"
CONFIG = FOLDER / "haproxy.cfg"
REPLICAS = 'server-template api- 32 "${API_HOST-api}:8000" resolvers docker init-addr none'
END_SECONDS = 10.0


@dataclass(frozen=True)
class Proxy:
    """A running HAProxy."""

    url: str
    exporter: str
    """URL of its metrics."""
    log: Path
    pid: int


def proxy_config(text: str, front: str, exporter: str, generate: Sequence[int], light: Sequence[int]) -> str:
    """Return a configuration with the addresses of this machine.

    Args:
        text: the configuration of deploy/haproxy, perhaps edited.
        front: address of the proxy, as after `bind`.
        exporter: address of its metrics.
        generate: ports of the replicas of routes that generate; their servers are api-1, api-2 ...
        light: ports of the replicas of all other routes.

    Raises:
        ValueError: the text does not have the expected lines.
    """
    changes = (
        (REPLICAS, 2, [_servers(generate), _servers(light)]),
        ("bind :8000\n", 1, [f"bind {front}\n"]),
        ("bind :8404\n", 1, [f"bind {exporter}\n"]),
    )
    for line, count, news in changes:
        if text.count(line) != count:
            raise ValueError(f"{CONFIG} must have the line {line.strip()!r} {count} times")
        for new in news:
            text = text.replace(line, new, 1)
    return text


def _servers(ports: Sequence[int]) -> str:
    return "\n    ".join(f"server api-{number} 127.0.0.1:{port}" for number, port in enumerate(ports, 1))


@contextmanager
def haproxy(
    program: str,
    folder: Path,
    replicas: Sequence[int],
    *,
    light: Sequence[int] | None = None,
    hosts: str = "127.0.0.1",
    edit: Callable[[str], str] = lambda config: config,
) -> Iterator[Proxy]:
    """Run HAProxy in front of replicas on these ports. Requests get 503 until the replicas' health has been checked.

    Args:
        program: path of HAProxy.
        folder: for its files.
        replicas: ports of the replicas.
        light: ports of the replicas of routes that do not generate; None: the same.
        hosts: Host names that clients may use, separated by spaces.
        edit: changes the configuration before the addresses of this run are inserted.

    Raises:
        ValueError: as `proxy_config`.
    """
    text, log = edit(CONFIG.read_text(encoding="utf-8")), folder / "haproxy.log"
    light = replicas if light is None else light
    shutil.copy(FOLDER / "errors.map", folder)
    with (
        socket.create_server(
            ("127.0.0.1", 0)
        ) as front,  # sockets that HAProxy inherits: no other process gets the ports
        socket.create_server(("127.0.0.1", 0)) as exporter,
        log.open("wb") as output,
    ):
        listeners = front, exporter
        config = proxy_config(text, f"fd@{front.fileno()}", f"fd@{exporter.fileno()}", replicas, light)
        (folder / "haproxy.cfg").write_text(config, encoding="utf-8")
        process = subprocess.Popen(  # noqa: S603  # HAProxy
            [program, "-db", "-f", str(folder / "haproxy.cfg")],
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno() for listener in listeners],
            env={**os.environ, "ALLOWED_HOSTS": hosts},
        )
        try:
            url, metrics = (f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
            yield Proxy(url, metrics, log, process.pid)
        finally:
            process.kill()
            process.wait(END_SECONDS)
