"""HAProxy with the configuration of deploy/, before a replica that dies."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.haproxy import Proxy
from tests.integration import proxies
from tests.waiting import PATIENCE_S, until


class Replica(BaseHTTPRequestHandler):
    """A replica that answers every request, and dies when it receives a certain header: always, or once per value."""

    protocol_version = "HTTP/1.1"
    died: set[str]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        die = self.headers.get("X-Die", "")
        if die and die not in self.died:
            if die != "now":
                self.died.add(die)
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


class Replicas(ThreadingHTTPServer):
    """Server of replicas whose health checks the proxy may close early."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


@contextmanager
def proxied(folder: Path) -> Iterator[Proxy]:
    """Run HAProxy before a replica."""
    died: set[str] = set()
    with Replicas(("127.0.0.1", 0), type("Dying", (Replica,), {"died": died})) as replica:
        threading.Thread(target=replica.serve_forever, daemon=True).start()
        try:
            with proxies.haproxy(folder, [replica.server_port]) as proxy:
                yield proxy
        finally:
            replica.shutdown()


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/generate"), ("GET", "/v1/models")])
def test_a_replica_that_dies_during_a_later_request_of_a_client_is_a_502_and_a_log_line(
    tmp_path: Path, method: str, path: str
) -> None:
    with proxied(tmp_path) as proxy:
        client = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=PATIENCE_S)

        def ask(**headers: str) -> tuple[int, bytes]:
            client.request(method, path, headers={"Content-Type": "application/json", **headers})
            answer = client.getresponse()
            return answer.status, answer.read()

        until(lambda: ask()[0] == 200)  # 503 until the replica's health has been checked
        status, body = ask(**{"X-Die": "now"})
        assert status == 502
        assert json.loads(body)["status"] == 502
        client.close()
        until(lambda: b" 502 " in proxy.log.read_bytes())
        assert b" SH-- " in proxy.log.read_bytes()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/models", 200), ("POST", "/v1/admin/models/m/load", 502), ("POST", "/v1/generate", 502)],
)
def test_only_a_get_is_sent_again_when_its_replica_closes_the_connection_unanswered(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    with proxied(tmp_path) as proxy:
        until(lambda: httpx.request(method, proxy.url + path, timeout=PATIENCE_S).status_code == 200)
        answer = httpx.request(method, proxy.url + path, headers={"X-Die": "once"}, timeout=PATIENCE_S)
        assert answer.status_code == status
