"""Determine the client of a request, the unit of fairness: the name of its API key, or its address."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from service.hosts import Network
from service.http.door.keys import Limits

IPV6_PREFIX = 64
"""Prefix length assigned to one household or machine; all addresses of a prefix count as one client."""
WITH_PORT = re.compile(r"\[(?P<ipv6>[^\[\]]*)\](:\d*)?|(?P<ipv4>[\d.]+):\d*")
"""Address with a port, or IPv6 address in brackets, as some proxies write into X-Forwarded-For."""


@dataclass(frozen=True)
class Client:
    """The client of a request and its permissions."""

    name: str
    """`key:NAME` or an address; "" if unknown."""
    limits: Limits = field(default_factory=Limits)
    admin: bool = False
    """Whether the client may load and unload models."""


def client_of(peer: str, forwarded_for: Sequence[str], trusted_proxies: Collection[Network]) -> str:
    """Return the client address of a request: the peer, or the address reported by a chain of trusted proxies.

    Every proxy appends the address of its peer. Since any client can send the header, the chain is read from its end,
    and only as far as the reporting proxies are trusted.

    Elements may have a port, and brackets around an IPv6 address. An element that is not an address ends the chain; the
    client is then the proxy that wrote it.

    Args:
        peer: address of the other end of the connection; "" if there is none.
        forwarded_for: values of the X-Forwarded-For headers, in order.
        trusted_proxies: addresses of proxies.

    Returns:
        The address; for IPv6, its network. A peer that is not an address is returned unchanged.
    """
    chain = [name.strip() for value in forwarded_for for name in value.split(",")]
    address = _address(peer)
    while chain and address is not None and any(address in network for network in trusted_proxies):
        named = _address(chain.pop())
        if named is None:
            break
        address = named
    if address is None:
        return peer
    if isinstance(address, IPv6Address):
        return str(ip_network((address, IPV6_PREFIX), strict=False))
    return str(address)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    with_port = WITH_PORT.fullmatch(text)
    try:
        address = ip_address((with_port["ipv6"] or with_port["ipv4"]) if with_port else text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
