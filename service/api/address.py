"""Whether a port is free: asked before models are loaded, since the server itself binds it when they are."""

from __future__ import annotations

import errno
import socket

from service.errors import AddressError


def refuse_taken_address(host: str, port: int) -> None:
    """Try to bind what the service will listen on.

    Raises:
        AddressError: another process listens there, ports below 1024 are not for this user, or no such host is known.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise AddressError(f"host: {host!r} is no address of this machine: {error.strerror}") from error
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed one lingers
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as the server: leaves IPv4 to others
                probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise AddressError(f"port: {port} of {host} cannot be listened on: {error.strerror}") from error
            # Anything else is the server's to tell, which passes over some: IPv6 where there is none
