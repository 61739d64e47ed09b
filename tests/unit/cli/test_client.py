"""The client of a request: the peer, or the address that trusted proxies report."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from service.http.door.client import client_of

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::1/128"))


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], "192.0.2.7"),  # any client can send the header
        ("10.0.0.2", [], "10.0.0.2"),
        ("10.0.0.2", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.2", ["203.0.113.9, 198.51.100.1"], "198.51.100.1"),  # the client wrote the first one
        ("10.0.0.2", ["203.0.113.9", "198.51.100.1, 10.0.0.3"], "198.51.100.1"),  # two trusted proxies
        ("10.0.0.2", ["10.0.0.4, 10.0.0.3"], "10.0.0.4"),
        ("10.0.0.2", ["198.51.100.1:5555"], "198.51.100.1"),
        ("10.0.0.2", ["198.51.100.1:"], "198.51.100.1"),
        ("10.0.0.2", ["203.0.113.9, 198.51.100.1:5555, 10.0.0.3:80"], "198.51.100.1"),
        ("10.0.0.2", ["[2001:db8:1:2::5]:443"], "2001:db8:1:2::/64"),
        ("10.0.0.2", ["[2001:db8:1:2::5]"], "2001:db8:1:2::/64"),
        ("10.0.0.2", ["[::ffff:198.51.100.1]:443"], "198.51.100.1"),
        ("10.0.0.2", ["198.51.100.1, 2001:db8:1:2::5:443"], "2001:db8:1:2::/64"),  # no brackets: no port
        ("10.0.0.2", ["198.51.100.1, unknown"], "10.0.0.2"),
        ("10.0.0.2", ["198.51.100.1, images.example:80"], "10.0.0.2"),
        ("10.0.0.2", ["198.51.100.1, [10.0.0.3"], "10.0.0.2"),
        ("10.0.0.2", [""], "10.0.0.2"),
        ("::ffff:10.0.0.2", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("fd00::1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", [], "2001:db8:1:2::/64"),
        ("testclient", ["198.51.100.1"], "testclient"),
        ("", [], ""),
    ],
)
def test_the_client_is_the_peer_of_the_last_trusted_proxy(peer: str, forwarded_for: list[str], client: str) -> None:
    assert client_of(peer, forwarded_for, PROXIES) == client
