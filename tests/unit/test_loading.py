"""What `iddpm serve` finds out before it is a server: networks are loaded beside, and a taken port is told at once."""

from __future__ import annotations

import gc
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from service.api.address import refuse_taken_address
from service.errors import AddressError, ModelError
from service.loading import ModelLoader, in_daemon
from service.settings import Settings


class Loaded:
    """Stands for a network, and can be watched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Networks are loaded when this is set."""
    opened = threading.Event()

    def load(folder: Path, *_: Any) -> Loaded:
        assert opened.wait(60)
        if folder.name == "bad":
            raise ModelError("bad: is no model")
        return Loaded(folder)

    monkeypatch.setattr("service.loading.load_denoiser", load)
    yield opened
    opened.set()


def test_networks_are_loaded_while_somebody_else_works(gate: threading.Event) -> None:
    loader = ModelLoader(Settings(models=(Path("b"), Path("a"))))
    loader.begin()  # does not wait
    gate.set()
    assert {name: network.folder for name, network in loader.load_all().items()} == {"b": Path("b"), "a": Path("a")}


def test_what_is_wrong_with_a_folder_is_told_where_the_networks_are_asked_for(gate: threading.Event) -> None:
    loader = ModelLoader(Settings(models=(Path("a"), Path("bad"))))
    loader.begin()
    gate.set()
    with pytest.raises(ModelError, match="bad: is no model"):
        loader.load_all()


def test_a_loader_keeps_no_network(gate: threading.Event) -> None:
    gate.set()
    loader = ModelLoader(Settings(models=(Path("a"),)))
    loader.begin()
    network = weakref.ref(loader.load_all()["a"])
    gc.collect()
    assert network() is None
    assert loader.load_all()["a"] is not None  # and loads again


def test_names_that_are_equal_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ModelError, match="which must differ; twice here: a"):
        ModelLoader(Settings(models=(Path("x/a"), Path("y/a"))))


def test_a_thread_beside_keeps_no_process_from_ending() -> None:
    assert in_daemon(lambda: threading.current_thread().daemon).result(60)


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
