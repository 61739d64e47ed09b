"""The lines of deploy/README.md for TLS and for a path prefix, in the proxy's configuration."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.integration import proxies
from tests.integration.exact_process import free_port
from tests.integration.test_proxy import Replica, Replicas
from tests.paths import ROOT
from tests.waiting import until

NAME = "images.example"


class PathReplica(Replica):
    """A replica that answers with the path that it was asked for."""

    def do_GET(self) -> None:  # noqa: N802  # the name that http.server calls
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def documented(start: str) -> str:
    """Return the block of HAProxy's configuration in the runbook that starts like this."""
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```haproxy\n(.*?)```", text, re.DOTALL) if start in block)
    assert isinstance(block, str)
    return block


@contextmanager
def proxied(folder: Path) -> Iterator[int]:
    """Run HAProxy with the documented lines; yield the port with TLS."""
    proxies.self_signed(folder, NAME)
    pair = (folder / name for name in ("fullchain.pem", "privkey.pem"))
    (folder / "site.pem").write_text("".join(file.read_text() for file in pair))
    tls = free_port()
    bind = documented("bind :8443").replace(":8443", f"127.0.0.1:{tls}")
    bind = bind.replace("/usr/local/etc/haproxy/tls/", f"{folder}/")

    def with_tls(config: str) -> str:
        assert config.count("bind :8000\n") == 1
        return config.replace("bind :8000\n", f"bind :8000\n{bind}{documented('replace-path')}")

    with Replicas(("127.0.0.1", 0), PathReplica) as replica:
        threading.Thread(target=replica.serve_forever, daemon=True).start()
        try:
            with proxies.haproxy(folder, [replica.server_port], hosts=NAME, edit=with_tls):
                yield tls
        finally:
            replica.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client that trusts the certificate and connects to the proxy."""
    folder = tmp_path_factory.mktemp("proxy")
    with proxied(folder) as tls:
        trust = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
        with httpx.Client(
            base_url=f"https://127.0.0.1:{tls}", verify=trust, headers={"Host": NAME}, trust_env=False
        ) as client:

            def answers() -> bool:
                try:
                    return ask(client, "/v1/models").status_code == 200  # 503 until the replica's health is known
                except httpx.ConnectError:
                    return False

            until(answers)
            yield client


def ask(client: httpx.Client, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    """Send a request to the host of the certificate, whose name no DNS knows."""
    return client.request(method, path, headers=headers, extensions={"sni_hostname": NAME})


def test_clients_that_know_the_certificate_use_the_service_over_tls(site: httpx.Client) -> None:
    answer = ask(site, "/v1/generate", "POST")
    assert (answer.status_code, answer.text, answer.http_version) == (200, "/v1/generate", "HTTP/1.1")
    assert ask(site, "/v1/models", Host="other.example").status_code == 421
    with (
        httpx.Client(trust_env=False) as stranger,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        stranger.get(str(site.base_url))


def test_the_prefix_is_removed(site: httpx.Client) -> None:
    assert ask(site, "/generator/v1/generate", "POST").text == "/v1/generate"
    assert ask(site, "/generator/page/main.js?v=1").text == "/page/main.js?v=1"
    assert ask(site, "/generator/").text == "/"
    redirected = ask(site, "/generator")
    assert (redirected.status_code, redirected.headers["Location"]) == (308, "/generator/")
