"""Hosts and networks from settings are normalised, or refused with the value to write instead."""

from __future__ import annotations

import asyncio
import re
from ipaddress import ip_network

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.hosts import canonical_host, network_of
from service.http.door.guard import Guard


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("localhost", "localhost"),
        ("Images.Example", "images.example"),
        ("images.example.", "images.example"),
        ("my_service", "my_service"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("Bücher.example", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example"),  # as browsers write it; Python's codec says fass.example
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("0:0:0:0:0:0:0:1", "[::1]"),
        ("2001:DB8::A", "[2001:db8::a]"),
        ("fe80::1%eth0", "[fe80::1]"),  # a Host header has no zone
    ],
)
def test_hosts_are_normalised(written: str, host: str) -> None:
    assert canonical_host(written) == host
    assert canonical_host(host) == host


@pytest.mark.parametrize(
    ("written", "cure"),
    [
        ("localhost:9101", "write localhost"),
        ("[::1]:8000", "write [::1]"),
        ("https://images.example", "write images.example"),
        ("https://Bücher.example:443/v1", "write xn--bcher-kva.example"),
        ("images.example/", "write images.example"),
        ("user@images.example", "write images.example"),
        ("*.example.com", "list each name, or write * alone"),
        ("*", "write * alone"),
        ("localhost 127.0.0.1", "separate several with commas"),
        ('["localhost"', "neither a host name nor an IP address"),
        ("a..b", "neither a host name nor an IP address"),
        ("a" * 64, "neither a host name nor an IP address"),
        (".".join(["a" * 63] * 4), "neither a host name nor an IP address"),
        ("[::1", "neither a host name nor an IP address"),
        ("", "neither a host name nor an IP address"),
    ],
)
def test_values_that_no_host_header_can_have_are_refused_with_a_remedy(written: str, cure: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(written))} .*{re.escape(cure)}"):
        canonical_host(written)


@pytest.mark.parametrize(
    ("header", "served"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("localhost.:8000", True),
        ("[::1]:8000", True),
        ("[0:0::1]", True),
        ("xn--bcher-kva.example", True),
        ("b\xfccher.example", False),  # not valid in a request
        ("::1", False),
        ("localhost@evil.example", False),
        ("evil.example", False),
        ("http://localhost", False),
        ("localhost/", False),
        ("", False),
    ],
)
def test_a_host_header_is_normalised_like_the_settings(header: str, served: bool) -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(app, [canonical_host(name) for name in ("localhost", "::1", "bücher.example")])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", header.encode("latin-1"))]}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == (200 if served else 421)


@pytest.mark.parametrize(
    ("written", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.5", "10.0.0.5/32"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
        ("[fd00::1]", "fd00::1/128"),
        ("fd00::/8", "fd00::/8"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),  # peers are compared as IPv4
        ("::ffff:10.0.0.5", "10.0.0.5/32"),
        ("::/0", "::/0"),
    ],
)
def test_a_network_or_a_single_address_is_read(written: str, network: str) -> None:
    assert network_of(written) == ip_network(network)


@pytest.mark.parametrize(
    ("written", "cure"),
    [
        ("*", "0.0.0.0/0,::/0 trusts every address"),
        ("10.0.0.5/8", "write 10.0.0.0/8 for the network, or 10.0.0.5 for the address"),
        ("2001:db8::1/32", "write 2001:db8::/32 for the network, or 2001:db8::1 for the address"),
        ("10.0.0.5:8080", "write 10.0.0.5"),
        ("[fd00::1]:8080", "write fd00::1"),
        ("http://10.0.0.5", "write 10.0.0.5"),
        ("proxy", "host names are not supported"),
        ("localhost", "host names are not supported"),
        ("10.0.0.0/33", "neither an IP address nor a network"),
        ("10.0.0.1 10.0.0.2", "separate several with commas"),
        ("", "neither an IP address nor a network"),
    ],
)
def test_values_that_are_no_network_are_refused_with_a_remedy(written: str, cure: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(written))} .*{re.escape(cure)}"):
        network_of(written)
