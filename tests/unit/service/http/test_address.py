"""The address of `iddpm serve` is checked before models are loaded."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from cli.main import app
from service.errors import AddressError
from service.http.door.address import bind, refuse_taken_address, url_of


@pytest.fixture
def taken() -> Iterator[int]:
    """Yield a port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_ends_the_command_before_a_model_is_loaded(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.logs.configure_logging", lambda: None)  # it would keep the runner's stderr
    ended = CliRunner().invoke(app, ["serve", "--model", "nowhere", "--port", str(taken)])
    assert ended.exit_code == 1
    assert ended.stderr.strip() == f"error: port: {taken} of 127.0.0.1 cannot be bound: Address already in use"


@pytest.mark.parametrize("host", ["no-such-host.invalid", ".invalid", "x" * 64 + ".invalid"])
def test_an_unknown_host_is_refused(host: str) -> None:
    with pytest.raises(AddressError, match=rf"host: '{re.escape(host)}' is not an address of this machine: \w"):
        refuse_taken_address(host, 8000)


def test_a_port_that_was_closed_is_free_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            pass
    refuse_taken_address("127.0.0.1", port)  # its connection lingers
    refuse_taken_address("127.0.0.1", 0)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(AddressError, match=r"host: '192\.0\.2\.1' is not an address of this machine: Cannot assign"):
        bind("192.0.2.1", 0)


dual_stack = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="a machine without IPv6")


def reached(listener: socket.socket) -> list[str]:
    """Return the loopback addresses by which a bound socket is reached."""
    found = []
    listener.listen()
    for address in ("127.0.0.1", "::1"):
        with suppress(OSError), socket.create_connection((address, listener.getsockname()[1])):
            found.append(address)
    return found


@dual_stack
@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("::", ["127.0.0.1", "::1"]),
        ("", ["127.0.0.1", "::1"]),
        ("0.0.0.0", ["127.0.0.1"]),  # noqa: S104  # the address is the subject of this test
        ("::1", ["::1"]),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_all_of_ipv6_includes_ipv4_and_single_addresses_do_not(host: str, addresses: list[str]) -> None:
    (listener,) = bind(host, 0)
    with listener:
        assert reached(listener) == addresses


def test_without_ipv6_an_empty_host_is_all_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.has_dualstack_ipv6", lambda: False)
    (listener,) = bind("", 0)
    with listener:
        assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104  # the address is the subject of this test
        assert "127.0.0.1" in reached(listener)


def test_a_name_with_several_addresses_gets_one_port_on_the_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    inet = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    known = ["192.0.2.1", "127.0.0.1", "127.0.0.1", "127.0.0.2"]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(*inet, (address, 0)) for address in known])
    listeners = bind("images.example", 0)
    names = [listener.getsockname() for listener in listeners]
    assert [url_of(listener) for listener in listeners] == [f"http://{host}:{names[0][1]}" for host, _ in names]
    for listener in listeners:
        listener.close()
    assert [host for host, _ in names] == ["127.0.0.1", "127.0.0.2"]


@dual_stack
def test_a_port_used_on_ipv4_is_taken_for_all_of_ipv6(taken: int) -> None:
    refuse_taken_address("::1", taken)
    for host in ("::", ""):
        with pytest.raises(AddressError, match=f"port: {taken} of :: cannot be bound: Address already in use"):
            refuse_taken_address(host, taken)
