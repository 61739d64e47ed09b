"""Normalise the host names and networks in settings; errors say what to write instead."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from urllib.parse import urlsplit

import idna

Network = IPv4Network | IPv6Network

MAX_NAME = 253
LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
"""Host names must not contain underscores, but names of services in container networks often do."""
NAME = re.compile(rf"{LABEL}(\.{LABEL})*")
MAPPED_BITS = 96
"""Length of the prefix before the IPv4 address in an IPv4-mapped IPv6 address, in bits."""


def canonical_host(text: str) -> str:
    """Return the canonical form of a host, in which Host headers are compared.

    Args:
        text: a name or an address without scheme and port. Case, a dot at the end, brackets around an IPv6 address and
            its zeros make no difference. Names in other scripts are converted to punycode, which clients send.

    Returns:
        A name in lower case, an IPv4 address, or an IPv6 address in brackets.

    Raises:
        ValueError: text is neither; the message says what to write instead, if that is clear.
    """
    try:
        return _canonical(text)
    except ValueError:
        pass
    if "*" in text:
        raise ValueError(f"{text!r} matches no Host header: list each name, or write * alone to accept all")
    try:
        host = _canonical(_host_in(text))
    except ValueError:
        raise ValueError(f"{text!r} is neither a host name nor an IP address; separate several with commas") from None
    raise ValueError(f"{text!r} must be a host without scheme, port and path: write {host}")


def network_of(text: str) -> Network:
    """Return a network, or the network of a single address; an IPv4-mapped IPv6 network becomes an IPv4 network.

    Raises:
        ValueError: text is neither; the message says what to write instead, if that is clear.
    """
    try:
        network = ip_network(without_brackets(text))
    except ValueError:
        raise ValueError(_why_no_network(text)) from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= MAPPED_BITS:  # peers are compared by their IPv4 address
        return IPv4Network((mapped, network.prefixlen - MAPPED_BITS))
    return network


def _canonical(text: str) -> str:
    try:
        address = ip_address(without_brackets(text))
    except ValueError:
        pass
    else:  # without the zone, which Host headers do not have
        return f"[{IPv6Address(int(address))}]" if isinstance(address, IPv6Address) else str(address)
    name = text.removesuffix(".").lower()
    if not name.isascii():
        name = idna.encode(name, uts46=True).decode()
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise ValueError("neither a name nor an address")
    return name


def _why_no_network(text: str) -> str:
    if text == "*":
        return "'*' is not a network: list the addresses of the proxies (0.0.0.0/0,::/0 trusts every address)"
    try:
        interface = ip_interface(without_brackets(text))
    except ValueError:
        pass
    else:
        return (
            f"{text!r} has host bits set: write {interface.network} for the network, or {interface.ip} for the address"
        )
    try:
        address = ip_address(_host_in(text))
    except ValueError:
        return (
            f"{text!r} is neither an IP address nor a network such as 10.0.0.0/8; host names are not supported; "
            "separate several with commas"
        )
    return f"{text!r} must be an address without scheme and port: write {address}"


def _host_in(text: str) -> str:
    """Return the host of a URL, or of HOST:PORT; "" if there is none, or text has another form."""
    parts = urlsplit(text if "//" in text else f"//{text}")
    return parts.hostname or "" if parts.path in ("", "/") or parts.scheme else ""


def without_brackets(text: str) -> str:
    """Remove the brackets around an IPv6 address; return other text unchanged."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text
