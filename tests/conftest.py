"""Settings for all tests."""

from __future__ import annotations

import gc
import locale
import os
import ssl
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.waiting import TEST_LIMIT_S

if TYPE_CHECKING:
    from tests.exports import Exports

# No deadlines: the time of an example depends on what else the machine does.
settings.register_profile("iddpm", deadline=None)
settings.load_profile("iddpm")

# Services under test are called directly, whatever proxy this machine needs for other hosts.
_others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [_others, "localhost,127.0.0.1"]))

_create_context = ssl.create_default_context


@cache
def _context(_key_log: str | None, *arguments: Any, **options: Any) -> ssl.SSLContext:
    return _create_context(*arguments, **options)


# httpx.get reads the machine's certificates at each call, which takes 30 ms; tests call it thousands of times.
ssl.create_default_context = lambda *arguments, **options: _context(
    os.environ.get("SSLKEYLOGFILE"), *arguments, **options
)


_CHARACTERS = locale.setlocale(locale.LC_CTYPE)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Restore the character set of text files and processes, which some libraries change to that of the C locale."""
    del item
    locale.setlocale(locale.LC_CTYPE, _CHARACTERS)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Set the limit of pytest-timeout, unless it was set on the command line, and what torch needs."""
    if config.option.timeout is None and "PYTEST_TIMEOUT" not in os.environ:
        config.option.timeout = TEST_LIMIT_S
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        _configure_torch()  # the main process of a parallel run needs no torch, and the others wait for it


def _configure_torch() -> None:
    import torch

    # Without a GPU, Triton's kernels run in its interpreter. Read when Triton is imported, also by other libraries.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"

    # Tiny networks: more threads only wait for each other.
    torch.set_num_threads(1)


LONGEST = ("test_export.py", "test_fleet.py", "test_base_install.py", "test_ranks.py")
"""The longest files. They begin first, so that none runs at the end while other processes have no work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import without garbage collections, and leave the modules out of later ones, which would visit them for 0.4 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Let the end of the process free modules as usual; libraries would report them as leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Graphs that many tests read."""
    from tests.exports import Exports  # the exporter's packages take seconds to import

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exports"
    folder.mkdir(exist_ok=True)
    return Exports(folder)
