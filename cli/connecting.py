"""How the client connects: the service's address, the proxy in front of it, the certificates that are trusted.

The environment is read here rather than by httpx, which builds every proxy that any variable names, used or not, and
raises what names no variable.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx

API_PATH = b"/v1"
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
HOST = re.compile(rb"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
MAX_PORT = 65535


def _socks_errors() -> tuple[type[Exception], ...]:
    return () if find_spec("socksio") is None else (import_module("socksio").SOCKSError,)


CONNECTION_ERRORS: tuple[type[Exception], ...] = (httpx.RequestError, *_socks_errors())
"""What can happen to a request; httpx lets through what its package raises when a SOCKS proxy breaks off."""


@dataclass(frozen=True)
class Connection:
    """Where requests go, and how."""

    options: dict[str, Any]
    """Arguments of httpx's clients, sync and async."""
    name: str
    """What errors call it; holds no secret."""


def connection(url: str, key: str | None, *, direct: bool = False) -> Connection:
    """Find out how a service is reached.

    Args:
        url: of the service; a path is a prefix that a proxy adds. `/v1` at its end is dropped, since clients of the
            OpenAI interface need it.
        key: API key, where the service wants one.
        direct: whether the caller brings its own transport: the environment says nothing then.

    Raises:
        ValueError: an address or a key that cannot be one, or a variable of the environment that it depends on; names
            the variable, but neither keys nor passwords.
    """
    address = _service_address(url)
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ValueError("key: must be printable ASCII characters")
    if key is not None and address.userinfo:
        raise ValueError("url: has a user name, which would be sent instead of the key; remove one of them")
    options = {
        "base_url": address,
        "headers": {} if key is None else {"Authorization": f"Bearer {key}"},
        "trust_env": False,
    }
    name = str(address.copy_with(userinfo=b""))
    if direct:
        return Connection(options, name)
    variable, proxy = _proxy_of(address)
    encrypted = "https" in (address.scheme, proxy.scheme if proxy is not None else "")
    certificates = _trusted_certificates() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
    options["verify"] = certificates
    if proxy is not None:
        options["proxy"] = httpx.Proxy(proxy, ssl_context=certificates if proxy.scheme == "https" else None)
        name += f" (through {variable}, {proxy.copy_with(userinfo=b'')})"
    return Connection(options, name)


def _service_address(url: str) -> httpx.URL:
    shown = _without_secrets(url)
    try:
        address = _parsed(url.strip())
    except ValueError as error:
        raise ValueError(f"url: {error}; got {shown!r}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"url: must be http://HOST[:PORT] or https://...; got {shown!r}")
    if address.query or address.fragment:
        raise ValueError(f"url: must end with its path, without ? and #; got {shown!r}")
    return address.copy_with(raw_path=address.raw_path.rstrip(b"/").removesuffix(API_PATH))


def _parsed(url: str) -> httpx.URL:
    """Parse a URL; what httpx lets through would fail only when a connection is made, with errors of other kinds."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        # Its words may quote what stands around the @ of a password
        raise ValueError("it cannot be read as a URL" if "@" in url else str(error)) from None
    if address.port is not None and not 0 < address.port <= MAX_PORT:
        raise ValueError(f"the port must be 1..{MAX_PORT}")
    if address.raw_host:
        try:
            address.raw_host.decode("ascii").encode("idna")  # as the resolver will
        except UnicodeError:
            raise ValueError("its host is no host name") from None
        if not HOST.fullmatch(address.raw_host):
            raise ValueError("its host is no host name")
    return address


def _proxy_of(address: httpx.URL) -> tuple[str, httpx.URL | None]:
    """Return the proxy that the environment names for an address, and the variable that names it; None: no proxy."""
    host, with_port = address.host, address.netloc.decode("ascii")
    if _is_this_machine(host) or proxy_bypass(host) or proxy_bypass(with_port):
        return "", None
    proxies = getproxies()
    kind = address.scheme if proxies.get(address.scheme) else "all"
    if not proxies.get(kind):
        return "", None
    named = next((name for name in (f"{kind}_proxy", f"{kind}_proxy".upper()) if os.environ.get(name)), "system proxy")
    value = proxies[kind].strip()
    shown = _without_secrets(value)
    try:
        proxy = _parsed(value if "://" in value else f"http://{value}")
    except ValueError as error:
        raise ValueError(f"{named}: {error}; got {shown!r}") from error
    if proxy.scheme not in PROXY_SCHEMES or not proxy.host:
        schemes = ", ".join(f"{scheme}://" for scheme in PROXY_SCHEMES)
        raise ValueError(f"{named}: must begin with one of {schemes} and name a host; got {shown!r}")
    if proxy.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(f"{named}: {shown!r} needs the package socksio: pip install 'httpx[socks]'")
    return named, proxy


def _is_this_machine(host: str) -> bool:
    """Return whether an address is reached without a network; a proxy would look for it on its own machine."""
    try:
        address = ip_address(host)
    except ValueError:
        name = host.lower().removesuffix(".")
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    address = mapped or address
    return address.is_loopback or address.is_unspecified


def _trusted_certificates() -> ssl.SSLContext:
    """Return what checks certificates: the authorities of SSL_CERT_FILE or SSL_CERT_DIR, else those of certifi."""
    file, folders, key_log = (os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"))
    for folder in filter(None, (folders or "").split(os.pathsep) if not file else []):  # the file goes first
        if not Path(folder).is_dir():  # which OpenSSL does not say
            raise ValueError(f"SSL_CERT_DIR: {folder!r} is no folder")
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or str(error)
        if key_log and error.filename == key_log:
            raise ValueError(f"SSLKEYLOGFILE: {key_log!r} cannot be written: {reason}") from error
        if file:
            raise ValueError(f"SSL_CERT_FILE: {file!r} holds no certificates that can be read: {reason}") from error
        raise


def _without_secrets(url: str) -> str:
    """Return a URL, or what should be one, without the user name and password that may be in it."""
    return re.sub(r"^(\w+://)?.*@", r"\1...@", url, flags=re.DOTALL)
