"""HAProxy, nginx and Prometheus with the files of deploy/; only addresses, paths and intervals are replaced."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.haproxy import Proxy
from benchmarks.haproxy import haproxy as run_haproxy
from tests.integration.exact_process import free_port, status_of
from tests.paths import ROOT
from tests.programs import tool
from tests.waiting import PATIENCE_S, until

NGINX = ROOT / "deploy" / "nginx"
PROMETHEUS = ROOT / "deploy" / "prometheus"
FRONT_NAME = "images.example"
"""Host name that nginx/front.conf serves."""


def _replaced(text: str, count: int, old: str, new: str) -> str:
    assert text.count(old) == count, old
    return text.replace(old, new)


@contextmanager
def _process(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **options)
        try:
            yield process
        finally:
            process.terminate()  # the workers of nginx outlive a killed master
            process.wait(PATIENCE_S)


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    def ready_or_gone() -> bool:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        return ready()

    until(ready_or_gone)


@contextmanager
def haproxy(folder: Path, replicas: Sequence[int], **options: Any) -> Iterator[Proxy]:
    """Run HAProxy in front of replicas on these ports (`benchmarks.haproxy`)."""
    with run_haproxy(tool("haproxy"), folder, replicas, **options) as proxy:
        yield proxy


@contextmanager
def _nginx(folder: Path, config: str, ready: str) -> Iterator[Path]:
    log = folder / "nginx.log"
    (folder / "nginx.conf").write_text(config, encoding="utf-8")
    command = [tool("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    with _process(command, log) as process:
        _wait(process, log, lambda: answers(ready))
        yield log


def answers(url: str) -> bool:
    """Return whether a server answers at this URL, with any status."""
    return status_of(url) is not None


@contextmanager
def nginx(folder: Path, replicas: Sequence[int], idle: str = "60s") -> Iterator[str]:
    """Run nginx in front of replicas on these ports; yield its URL.

    Args:
        folder: for its files.
        replicas: ports of the replicas.
        idle: time for which it keeps idle connections to replicas.
    """
    config, port = (NGINX / "nginx.conf").read_text(encoding="utf-8"), free_port()
    (line,) = re.findall(r"server api:8000 (.*);", config)
    servers = "\n".join(f"server 127.0.0.1:{replica} {line};" for replica in replicas)
    config = _replaced(config, 1, f"server api:8000 {line};", servers)
    config = _replaced(config, 1, "listen 8000;", f"listen 127.0.0.1:{port};")
    config = _replaced(config, 1, "listen 8000 default_server;", f"listen 127.0.0.1:{port} default_server;")
    config = _replaced(config, 1, "keepalive_timeout 60s;", f"keepalive_timeout {idle};")
    config = _replaced(config, 6, " /tmp/nginx", f" {folder}/nginx")
    with _nginx(folder, config, f"http://127.0.0.1:{port}/healthz"):
        yield f"http://127.0.0.1:{port}"


def self_signed(folder: Path, name: str) -> None:
    """Write a certificate for a host name, fullchain.pem, which is signed by its own key, privkey.pem."""
    made = [tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    named = ["-days", "1", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    files = ["-out", str(folder / "fullchain.pem"), "-keyout", str(folder / "privkey.pem")]
    subprocess.run([*made, *named, *files], check=True, capture_output=True, timeout=PATIENCE_S)


@contextmanager
def front(folder: Path, proxy: Proxy) -> Iterator[str]:
    """Run nginx with TLS in front of HAProxy; yield its URL. Its certificate is signed by itself."""
    port = free_port()
    self_signed(folder, FRONT_NAME)
    server = (NGINX / "front.conf").read_text(encoding="utf-8")
    server = _replaced(server, 1, "listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
    server = _replaced(server, 2, "proxy_pass http://127.0.0.1:8000", f"proxy_pass {proxy.url}")
    server = _replaced(server, 2, f"/etc/ssl/{FRONT_NAME}/", f"{folder}/")
    main = (NGINX / "nginx.conf").read_text(encoding="utf-8")
    outer, _, rest = main.partition("    upstream api {")
    assert rest
    config = _replaced(outer, 6, " /tmp/nginx", f" {folder}/nginx") + server + "}\n"
    with _nginx(folder, config, f"{proxy.url}/healthz"):
        until(lambda: _accepts(port))
        yield f"https://127.0.0.1:{port}"


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **params: str) -> Any:
        """Ask its API; return the data of the answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=PATIENCE_S).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, query: str) -> list[float]:
        """Return the values of an instant vector."""
        return [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]

    def one(self, query: str) -> float | None:
        """Return the only value of an instant vector; None if it is empty."""
        values = self.query(query)
        assert len(values) < 2
        return values[0] if values else None


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """Run Prometheus, which scrapes and evaluates every second.

    Args:
        folder: for its files.
        targets: addresses by the name of the job.
    """
    config, port, log = (
        yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text()),
        free_port(),
        folder / "prometheus.log",
    )
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    assert {job["job_name"] for job in config["scrape_configs"]} == {*targets, "prometheus"}
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": list(targets.get(job["job_name"], [f"127.0.0.1:{port}"]))}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [tool("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder / 'prometheus'}"]
    with _process([*command, f"--web.listen-address=127.0.0.1:{port}"], log) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, log, lambda: status_of(f"{url}/-/ready") == 200)
        yield Prometheus(url)
