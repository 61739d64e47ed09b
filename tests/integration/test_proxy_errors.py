"""The proxy of deploy/: its own errors have the form of the interface that was called."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from benchmarks.haproxy import FOLDER
from service.http.faults import REFUSED_BEFORE_WORK, Fault, as_openai_error
from service.http.interfaces import Interface, generates
from service.http.routes import RouteTable
from tests.integration import proxies
from tests.integration.exact_service import exact_app
from tests.waiting import PATIENCE_S, scaled

GENERATES = {
    "/v1/generate": Interface.NATIVE,
    "/v1/images/generations": Interface.OPENAI,
    "/v2/models/model/infer": Interface.KSERVE,
}


class Replica(BaseHTTPRequestHandler):
    """A replica that is ready, and disconnects during a request; with a query string it hangs instead."""

    released = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if "?" in self.path:
            self.released.wait(PATIENCE_S)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def with_short_timeouts(config: str) -> str:
    return re.sub(r"timeout (server|http-request) +\S+", rf"timeout \1 {scaled(5):.0f}s", config)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A proxy with short timeouts, one replica for routes that generate, and none for the rest."""
    folder = tmp_path_factory.mktemp("haproxy")
    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as replica:
        threading.Thread(target=replica.serve_forever).start()
        try:
            with proxies.haproxy(
                folder, [replica.server_port], light=[], hosts="127.0.0.1 [::1]", edit=with_short_timeouts
            ) as proxy:
                yield proxy.url
        finally:
            Replica.released.set()
            replica.shutdown()


def form_of(answer: httpx.Response) -> Interface:
    """Return the interface whose form this error of the proxy has."""
    body = answer.json()
    is_problem = answer.headers["content-type"] == "application/problem+json"
    if is_problem:
        assert body["status"] == answer.status_code
    detail = body["detail"] if is_problem else None
    assert is_problem or (set(body) == {"error"} and answer.headers["content-type"] == "application/json")
    if isinstance(body.get("error"), str):
        return Interface.KSERVE
    if "error" not in body:
        assert "x-should-retry" not in answer.headers
        return Interface.NATIVE
    error = body["error"]
    assert detail in (None, error["message"])
    title = error["code"].replace("_", " ").capitalize()
    assert error == as_openai_error(Fault(status=answer.status_code, title=title, detail=error["message"]))
    assert answer.headers["x-should-retry"] == ("true" if answer.status_code in REFUSED_BEFORE_WORK else "false")
    return Interface.NATIVE_AND_OPENAI if is_problem else Interface.OPENAI


def ask(method: str, url: str, **options: Any) -> httpx.Response:
    with httpx.Client(timeout=PATIENCE_S, verify=False) as client:  # noqa: S501  # nothing here is encrypted
        return client.request(method, url, **options)


def test_proxy_and_service_agree_on_the_interface_of_a_path(proxy: str) -> None:
    table = RouteTable(exact_app(admin_root=FOLDER).routes)
    known = [route.template.replace("{", "").replace("}", "") for route in table]
    unknown = ["/v1", "/v1/chat/completions", "/v1/images/edits", "/v2/", "/v2/nowhere", "/v1/generate/", "/nowhere"]
    assert {"/v1/models/name/thumbnails/class_index", "/v1/admin/models/name/load", *GENERATES} < {*known, *unknown}
    for path in known + unknown:
        answer = ask("POST", proxy + path, json={})
        assert form_of(answer) is table.interface_of(path), path
        if generates("POST", path):
            assert answer.status_code == 502
        elif answer.status_code == 503:
            assert answer.headers["retry-after"] == "10"


@pytest.mark.parametrize(("query", "status"), [("", 502), ("?hang", 504)])
def test_errors_for_a_replica_that_disconnects_or_hangs_have_the_callers_form(
    proxy: str, query: str, status: int
) -> None:
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda path: ask("POST", proxy + path + query, json={}), GENERATES)
    for answer, interface in zip(answers, GENERATES.values(), strict=True):
        assert (answer.status_code, form_of(answer)) == (status, interface)
        assert "retry-after" not in answer.headers


def test_the_error_for_a_foreign_host_has_the_callers_form(proxy: str) -> None:
    for path, interface in {**GENERATES, "/v1/models": Interface.NATIVE_AND_OPENAI}.items():
        answer = ask("GET", proxy + path, headers={"Host": "evil.example"})
        assert (answer.status_code, form_of(answer)) == (421, interface)


@pytest.mark.parametrize(("body", "status"), [("no length\r\n", 400), ("5\r\nhalf", 408)], ids=["damaged", "late"])
def test_the_error_for_a_body_that_is_damaged_or_late_has_the_callers_form(proxy: str, body: str, status: int) -> None:
    address = httpx.URL(proxy)

    def send(path: str) -> httpx.Response:
        with socket.create_connection((address.host, address.port or 0), PATIENCE_S) as client:
            lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Transfer-Encoding: chunked", "Expect: 100-continue"]
            client.sendall("\r\n".join([*lines, "", ""]).encode())
            while client.recv(1) != b"\n":  # "100 Continue": the proxy has the head, and waits for the body
                pass
            assert client.recv(2, socket.MSG_WAITALL) == b"\r\n"
            client.sendall(body.encode())
            answer = HTTPResponse(client)
            answer.begin()
            return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(send, GENERATES))
    for response, interface in zip(answers, GENERATES.values(), strict=True):
        assert (response.status_code, form_of(response)) == (status, interface)


def test_error_bodies_have_the_same_content_in_every_form() -> None:
    lines = [line for line in (FOLDER / "errors.map").read_text().splitlines() if line and not line.startswith("#")]
    bodies = {key: json.loads(value) for key, _, value in (line.partition(" ") for line in lines)}
    statuses = {key.partition("/")[0] for key in bodies}
    config = (FOLDER / "haproxy.cfg").read_text()
    assert statuses == set(re.findall(r"str\((\d+)/\)", config))
    for status in statuses:
        native, openai, kserve, both = (bodies[f"{status}/{form}"] for form in ("native", "openai", "kserve", "both"))
        assert both == native | openai
        assert native["detail"] == openai["error"]["message"] == kserve["error"]
        assert (native["status"], native["title"]) == (int(status), HTTPStatus(int(status)).phrase)
