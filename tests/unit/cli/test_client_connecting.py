"""How the client connects: addresses, proxies and certificates, and which of them an error names."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import httpx
import pytest

from cli import connecting
from cli.client import AsyncClient, Client, ConnectionLost
from cli.connecting import connection
from tests.waiting import PATIENCE_S

SOCKS = {"ALL_PROXY": "socks5://127.0.0.1:1"}
SERVICE = "http://images.example"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the proxies and certificates of the machine that runs the tests."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
            monkeypatch.delenv(name)


def connected(monkeypatch: pytest.MonkeyPatch, url: str, **environment: str) -> connecting.Connection:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = connection(url, None)
    httpx.Client(**found.options).close()  # its errors would name no variable
    return found


def proxy_of(found: connecting.Connection) -> str | None:
    proxy = found.options.get("proxy")
    return None if proxy is None else str(proxy.url)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/", "http://host:8000"),
        (" http://host:8000\n", "http://host:8000"),
        ("http://host:8000/v1", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/iddpm/v1", "https://host/iddpm"),
        ("https://host/iddpm/", "https://host/iddpm"),
        ("https://host/xv1", "https://host/xv1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
        ("http://Bücher.example", "http://xn--bcher-kva.example"),
        ("http://my_service", "http://my_service"),
    ],
)
def test_an_address_may_end_like_those_of_openai_clients(url: str, address: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"data": [], "models": []})

    with Client(url, transport=httpx.MockTransport(answer)) as client:
        client.models()
    assert asked == [f"{address}/v1/models"]


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "ftp://service", "http://", "http://host:port", "", "http://host:0", "http://host:99999",
        "http://[::1", "http://ho st", "http://a..b", "http://" + "a" * 64, "http://*", "http://host/?model=m",
        "http://host/v1#models", "http://host\x00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_invalid_address_is_refused_at_once(kind: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(ValueError, match=r"^url: .*; got "):
        kind(url)


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://me:secret@host:port", None),
        ("http://me:sec/ret@host", None),
        ("http://me:secret@host?x", None),
        ("ftp://me:secret@host", None),
        ("http://me:secret@host", "iddpm_x"),
    ],
)
def test_a_password_in_an_address_is_never_shown(url: str, key: str | None) -> None:
    with pytest.raises(ValueError, match=r"^url: ") as raised:
        Client(url, key=key)
    assert "sec" not in str(raised.value)


def test_a_password_in_an_address_is_sent_and_not_shown_in_errors() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"].startswith("Basic ")
        raise httpx.ReadTimeout("too long")

    client = Client("http://me:secret@host", transport=httpx.MockTransport(fail))
    with pytest.raises(ConnectionLost, match=r"^http://host: too long$"):
        client.models()


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "api.localhost", "127.0.0.1", "127.8.8.8", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"],  # noqa: S104  # not bound
)
@pytest.mark.parametrize(
    "environment", [SOCKS, {"ALL_PROXY": "socks://x:1"}, {"http_proxy": "http://p", "NO_PROXY": "[::1]"}], ids=str
)
def test_this_machine_is_reached_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, host: str, environment: dict[str, str]
) -> None:
    assert proxy_of(connected(monkeypatch, f"http://{host}:8000", **environment)) is None


@pytest.mark.parametrize(
    ("url", "environment", "proxy"),
    [
        (SERVICE, {}, None),
        (SERVICE, {"HTTP_PROXY": "http://p:3128"}, "http://p:3128"),
        (SERVICE, {"http_proxy": "p:3128", "HTTP_PROXY": "http://q"}, "http://p:3128"),
        (SERVICE, {"HTTP_PROXY": "http://p", "ALL_PROXY": "socks://q:1"}, "http://p"),  # unused variables are not read
        (SERVICE, {"HTTPS_PROXY": "socks://q:1"}, None),
        ("https://images.example", {"ALL_PROXY": "http://p"}, "http://p"),
        (SERVICE, {"ALL_PROXY": "https://p"}, "https://p"),
        (SERVICE, SOCKS | {"NO_PROXY": "images.example"}, None),
        (SERVICE, SOCKS | {"NO_PROXY": ".example"}, None),
        (SERVICE, SOCKS | {"NO_PROXY": "*"}, None),
        (SERVICE, {"ALL_PROXY": "http://p", "NO_PROXY": "[::1],,http://x:y, "}, "http://p"),
        ("http://[2001:db8::1]:8000", SOCKS | {"NO_PROXY": "[2001:db8::1]"}, None),
        ("http://[2001:db8::1]:8000", SOCKS | {"NO_PROXY": "2001:db8::1"}, None),
    ],
)
def test_other_machines_are_reached_through_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], proxy: str | None
) -> None:
    assert proxy_of(connected(monkeypatch, url, **environment)) == proxy


@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        (SERVICE, {"ALL_PROXY": "socks://p:1"}, "ALL_PROXY: must begin with one of http://, https://, socks5://"),
        (SERVICE, {"all_proxy": "ftp://p:1"}, "all_proxy: must begin with one of http://"),
        (SERVICE, {"HTTP_PROXY": "http://"}, "HTTP_PROXY: must begin with one of http://"),
        (SERVICE, {"HTTP_PROXY": "http://p:x"}, "HTTP_PROXY: Invalid port: 'x'; got 'http://p:x'"),
        (SERVICE, {"HTTP_PROXY": "http://p:99999"}, "HTTP_PROXY: the port must be 1..65535"),
        (SERVICE, {"HTTP_PROXY": "http://me:secret@p:x"}, "HTTP_PROXY: it cannot be read as a URL; got 'http://...@p:x'"),
        ("https://host", {"HTTPS_PROXY": "http://p q"}, "HTTPS_PROXY: the host is not a valid host name"),
        ("https://host", {"SSL_CERT_FILE": "/missing"}, "SSL_CERT_FILE: no certificates can be read from '/missing': "),
        ("https://host", {"SSL_CERT_FILE": "/"}, "SSL_CERT_FILE: no certificates can be read from '/': Is a dir"),
        ("https://host", {"SSL_CERT_FILE": os.devnull}, "SSL_CERT_FILE: no certificates can be read from '/dev/null'"),
        ("https://host", {"SSL_CERT_DIR": "/:/missing"}, "SSL_CERT_DIR: '/missing' is not a folder"),
        ("https://host", {"SSLKEYLOGFILE": "/missing/log"}, "SSLKEYLOGFILE: '/missing/log' cannot be written"),
        (SERVICE, {"HTTP_PROXY": "https://p", "SSL_CERT_FILE": "/missing"}, "SSL_CERT_FILE: "),
    ],
)  # fmt: skip
def test_errors_in_the_environment_name_the_variable(
    monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^[A-Za-z_]+: ") as raised:
        connected(monkeypatch, url, **environment)
    assert str(raised.value).startswith(message)
    assert "secret" not in str(raised.value)


def test_the_error_for_a_socks_proxy_without_its_package_names_variable_and_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connecting, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^ALL_PROXY: 'socks5://127.0.0.1:1' needs the package socksio: pip install "):
        connected(monkeypatch, SERVICE, **SOCKS)


def test_variables_that_plain_http_does_not_need_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    connected(monkeypatch, SERVICE, SSL_CERT_FILE="/missing", SSL_CERT_DIR="/missing", SSLKEYLOGFILE="/missing/log")


def test_the_error_for_a_proxy_that_does_not_answer_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://me:secret@127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with pytest.raises(
            ConnectionLost, match=r"^http://images.example \(through HTTP_PROXY, http://127.0.0.1:\d+\): "
        ):
            Client(SERVICE, patience_s=0).models()


@contextmanager
def plain_server() -> Iterator[tuple[int, list[int]]]:
    """Answer every connection in plain HTTP; yield the port, and a list that grows by one with each connection."""
    connections: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    accepted, _ = listening.accept()
                except OSError:
                    return
                with accepted:
                    if not accepted.recv(4096):
                        continue
                    connections.append(1)
                    accepted.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1], connections
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


async def ask_async(url: str) -> Any:
    async with AsyncClient(url) as client:
        return await client.models()


@pytest.mark.parametrize("ask", [lambda url: Client(url).models(), lambda url: asyncio.run(ask_async(url))])
def test_a_service_without_tls_is_called_once(ask: Any) -> None:
    with plain_server() as (port, connections):
        with pytest.raises(ConnectionLost, match=rf"^https://127.0.0.1:{port}: it does not use TLS: write http://"):
            ask(f"https://127.0.0.1:{port}")
        assert len(connections) == 1
