"""Who a request is from: the peer, or whom trusted proxies name."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from service.http.door.client import client_of

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::1/128"))


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], "192.0.2.7"),  # anybody can send the header
        ("10.0.0.2", [], "10.0.0.2"),
        ("10.0.0.2", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.2", ["203.0.113.9, 198.51.100.1"], "198.51.100.1"),  # what a client wrote before the proxy did
        ("10.0.0.2", ["203.0.113.9", "198.51.100.1, 10.0.0.3"], "198.51.100.1"),  # two proxies of ours
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
def test_the_client_is_whoever_the_last_trusted_proxy_was_asked_by(
    peer: str, forwarded_for: list[str], client: str
) -> None:
    assert client_of(peer, forwarded_for, PROXIES) == client
