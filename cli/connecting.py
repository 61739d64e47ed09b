"""The client's connection: the service's address, the proxy, and the trusted certificates.

The environment is read here rather than by httpx, which creates the proxies of all variables, used or not, and whose
errors do not name the variable.
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
HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
"""A value that arrives as it is: h11 refuses a header that ends with a blank, and servers remove blanks at the ends."""


def _socks_errors() -> tuple[type[Exception], ...]:
    return () if find_spec("socksio") is None else (import_module("socksio").SOCKSError,)


CONNECTION_ERRORS: tuple[type[Exception], ...] = (httpx.RequestError, *_socks_errors())
"""Exceptions of a request; httpx passes on those of its package socksio if a SOCKS proxy closes the connection."""


@dataclass(frozen=True)
class Connection:
    """The options of a connection, and its name."""

    options: dict[str, Any]
    """Keyword arguments of httpx.Client and httpx.AsyncClient."""
    name: str
    """Name in messages; contains no secrets."""


def connection(url: str, key: str | None, *, direct: bool = False) -> Connection:
    """Return the connection to a service.

    Args:
        url: of the service; a path is a prefix added by a proxy. `/v1` at the end, which clients of the OpenAI
            interface need, is removed.
        key: API key, if the service needs one.
        direct: whether the caller provides the transport; the environment is not read then.

    Raises:
        ValueError: the URL, the key or an environment variable is invalid. The message names the variable, but contains
            no keys or passwords.
    """
    address = _service_address(url)
    if key is not None and not HEADER_VALUE.fullmatch(key):
        raise ValueError("key: must be printable ASCII characters, without blanks at the beginning or end")
    if key is not None and address.userinfo:
        raise ValueError("url: must not have a user name if a key is given, which it would replace; remove one of them")
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
    certificates = (
        _trusted_certificates() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    )  # trusts no certificate
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
    """Parse a URL, with checks that httpx would make only when it connects, with other exceptions."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        # httpx's message may contain the password before the @
        raise ValueError("it cannot be read as a URL" if "@" in url else str(error)) from None
    if address.port is not None and not 0 < address.port <= MAX_PORT:
        raise ValueError(f"the port must be 1..{MAX_PORT}")
    if address.raw_host:
        try:
            address.raw_host.decode("ascii").encode("idna")  # as the resolver will
        except UnicodeError:
            raise ValueError("the host is not a valid host name") from None
        if not HOST.fullmatch(address.raw_host):
            raise ValueError("the host is not a valid host name")
    return address


def _proxy_of(address: httpx.URL) -> tuple[str, httpx.URL | None]:
    """Return the variable that sets the proxy for an address, and the proxy's URL; None if there is no proxy."""
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
    """Return whether an address is on this machine; a proxy would connect to its own machine instead."""
    try:
        address = ip_address(host)
    except ValueError:
        name = host.lower().removesuffix(".")
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    address = mapped or address
    return address.is_loopback or address.is_unspecified


def _trusted_certificates() -> ssl.SSLContext:
    """Return a context that trusts the authorities of SSL_CERT_FILE or SSL_CERT_DIR, else those of certifi."""
    file, folders, key_log = (os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"))
    for folder in filter(None, (folders or "").split(os.pathsep) if not file else []):  # the file has precedence
        if not Path(folder).is_dir():  # OpenSSL does not report it
            raise ValueError(f"SSL_CERT_DIR: {folder!r} is not a folder")
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or str(error)
        if key_log and error.filename == key_log:
            raise ValueError(f"SSLKEYLOGFILE: {key_log!r} cannot be written: {reason}") from error
        if file:
            raise ValueError(f"SSL_CERT_FILE: no certificates can be read from {file!r}: {reason}") from error
        raise


def _without_secrets(url: str) -> str:
    """Return a URL, valid or not, without user name and password."""
    return re.sub(r"^(\w+://)?.*@", r"\1...@", url, flags=re.DOTALL)
