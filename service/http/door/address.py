"""Create listening sockets for every address of a host, IPv4 and IPv6, on one port."""

from __future__ import annotations

import errno
import socket
from typing import Any

from service.errors import AddressError

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of addresses that this machine does not have, including IPv6 addresses if IPv6 is disabled."""


def refuse_taken_address(host: str, port: int) -> None:
    """Check that the service can listen on the address; called before models are loaded, as that takes long.

    Raises:
        AddressError: as `bind` does.
    """
    for listener in bind(host, port):
        listener.close()


def bind(host: str, port: int, backlog: int | None = None) -> list[socket.socket]:
    """Return sockets bound to every address of a host; the caller closes them.

    Args:
        host: an address or a name; `::` includes IPv4, `""` means every address of this machine.
        port: a port; 0: any free port, the same for all addresses.
        backlog: connections that the kernel keeps until they are accepted; None: the sockets do not listen.

    Raises:
        AddressError: another process listens there, ports below 1024 are not for this user, or no such host is known.
    """
    if not host:
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104  # what "" means
    bound: list[socket.socket] = []
    passed_over: OSError | None = None
    try:
        for family, address in _addresses(host):
            try:
                bound.append(_bind(family, (address[0], port, *address[2:]), backlog))
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise
                passed_over = error
            else:
                port = bound[-1].getsockname()[1]
        if not bound and passed_over is not None:
            raise passed_over
    except OSError as error:
        for listener in bound:
            listener.close()
        if error.errno in NOT_HERE or isinstance(error, socket.gaierror):
            raise AddressError(f"host: {host!r} is not an address of this machine: {error.strerror}") from error
        raise AddressError(f"port: {port} of {host} cannot be bound: {error.strerror}") from error
    return bound


def url_of(listener: socket.socket) -> str:
    """Return the URL of a socket, for logs."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _addresses(host: str) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # an empty or too long label
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _bind(family: socket.AddressFamily, address: tuple[Any, ...], backlog: int | None) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections linger in TIME_WAIT
        if family == socket.AF_INET6:
            both = address[0] == "::" and socket.has_dualstack_ipv6()
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind(address)
        if backlog is not None:
            listener.listen(backlog)  # if two processes have bound the port, the second one fails here
    except BaseException:
        listener.close()
        raise
    return listener
