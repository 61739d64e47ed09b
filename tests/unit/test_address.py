"""Where `iddpm serve` will listen is looked at before models are loaded."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from cli.main import app
from service.api.address import refuse_taken_address
from service.errors import AddressError


@pytest.fixture
def taken() -> Iterator[int]:
    """Yield a port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_ends_the_command_before_a_model_is_looked_at(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.logs.configure_logging", lambda: None)  # it would keep the runner's stderr
    ended = CliRunner().invoke(app, ["serve", "--model", "nowhere", "--port", str(taken)])
    assert ended.exit_code == 1
    assert ended.stderr.strip() == f"error: port: {taken} of 127.0.0.1 cannot be listened on: Address already in use"


def test_an_unknown_host_is_refused() -> None:
    with pytest.raises(AddressError, match=r"host: 'no-such-host\.invalid' is no address of this machine"):
        refuse_taken_address("no-such-host.invalid", 8000)


def test_a_port_that_was_closed_is_free_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            pass
    refuse_taken_address("127.0.0.1", port)  # its connection lingers
    refuse_taken_address("127.0.0.1", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="a machine without IPv6")
def test_a_port_of_ipv6_is_free_where_another_listens_on_ipv4_only() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:  # noqa: S104  # the address is the point
        refuse_taken_address("::", server.getsockname()[1])
