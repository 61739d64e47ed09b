"""Who asks: the key, or the address, that fairness between clients goes by."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from service.hosts import Network
from service.http.door.keys import Limits

IPV6_PREFIX = 64
"""What one household or machine gets: its addresses are one client."""
WITH_PORT = re.compile(r"\[(?P<ipv6>[^\[\]]*)\](:\d*)?|(?P<ipv4>[\d.]+):\d*")
"""What some proxies write in X-Forwarded-For instead of an address: one with a port, of IPv6 in brackets."""


@dataclass(frozen=True)
class Client:
    """Who asks, and what it may."""

    name: str
    """`key:NAME`, or an address; "" where nothing is known."""
    limits: Limits = field(default_factory=Limits)
    admin: bool = False
    """Whether its key may load and unload models."""


def client_of(peer: str, forwarded_for: Sequence[str], trusted_proxies: Collection[Network]) -> str:
    """Return whom a request is from: the peer, or whom a chain of trusted proxies names.

    Every proxy appends whom it was asked by, so the chain is believed from its end, and only as far as the proxies
    that say so are trusted: anybody can send the header.

    Elements may have a port, and brackets around an IPv6 address. What is no address ends the chain: the client is then
    the proxy that wrote it.

    Args:
        peer: address of the connection's other end; "" where there is none.
        forwarded_for: values of the X-Forwarded-For headers, in order.
        trusted_proxies: addresses of proxies.

    Returns:
        An address; of IPv6, its network. What is no address is returned as it is.
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
