"""`iddpm bench` against a stand-in service on a loopback port."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.load.report import Report
from cli.main import app
from service.http.native.schemas import ModelList
from tests.unit.cli.test_load import MODEL, answer

MODELS = ModelList(data=[], models=[MODEL]).model_dump_json().encode()


class Service(ThreadingHTTPServer):
    """Answers at once, with one image."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: list[dict[str, object]] = []
        self.keys: set[str | None] = set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_GET(self) -> None:
        self._send(MODELS)

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.add(self.headers["Authorization"])
        self._send(answer().content)

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def bench(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_load_is_reported_written_and_drawn(service: Service, tmp_path: Path) -> None:
    files = ("--out", tmp_path / "load.json", "--plot", tmp_path / "load.png")
    code, text = bench(
        service.url, "--rate", "50", "--duration", "0.3", "--seed", "1", "--key", "k", "--mix", "steps=7", *files
    )
    assert code == 0
    report = Report.model_validate_json((tmp_path / "load.json").read_bytes())
    assert report.all.answered == len(service.bodies) - 1 > 5  # the first one was the trial
    assert (report.url, report.rate, report.seed) == (service.url, 50, 1)
    assert report.models[0].name == "m"
    assert report.kinds[0].alone_s is not None
    assert {body["steps"] for body in service.bodies} == {7}
    assert service.keys == {"Bearer k"}
    assert f"{report.all.requests} requests, {report.all.answered} answered, 0 failed" in text
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rate", "1", "--concurrency", "1"], 2, "exclude each other"),
        (["--out", "missing/load.json"], 2, "--out: must be a .json file in a folder that exists"),
        (["--plot", "load.pdf"], 2, "--plot: must be a .png file"),
        (["--mix", "steps=0"], 1, "mix: 'steps=0': steps"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_sent(
    service: Service, arguments: list[str], code: int, message: str
) -> None:
    failed, text = bench(service.url, *arguments)
    assert (failed, message in text) == (code, True)
    assert service.bodies == []


def test_an_invalid_address_is_an_error() -> None:
    assert bench("service") == (1, "error: url: must be http://HOST[:PORT] or https://...; got 'service'\n")
