"""The complete app on a port of its own, around a network that a test controls, and Chromium that opens the page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

from service.http.app import assemble
from service.settings import Settings
from tests.integration.in_process import PausedDenoiser
from tests.programs import tool
from tests.waiting import PATIENCE_S, until

DESKTOP = {"width": 1280, "height": 800}


class Site:
    """A running service, as a browser reaches it."""

    def __init__(self, server: uvicorn.Server, port: int, *denoisers: PausedDenoiser) -> None:
        self.server = server
        self.denoiser = denoisers[0]
        self.denoisers = denoisers
        self.url = f"http://127.0.0.1:{port}/"

    def metric(self, name: str, **labels: str) -> float:
        text = httpx.get(self.url + "metrics", timeout=PATIENCE_S).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return next(sample.value for sample in samples if sample.labels == labels)

    def until(self, condition: Callable[[], bool]) -> None:
        until(condition)


@contextmanager
def serving(*denoisers: PausedDenoiser, **settings: Any) -> Iterator[Site]:
    """Serve models m0, m1, ... in this process."""
    served = {f"m{index}": denoiser for index, denoiser in enumerate(denoisers or (PausedDenoiser(),))}
    app = assemble(Settings(models=tuple(map(Path, served)), max_rows=4, max_queue=40, **settings), served)
    config = uvicorn.Config(app, port=0, log_config=None, http="h11", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    site = None
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started
        site = Site(server, server.servers[0].sockets[0].getsockname()[1], *served.values())
        site.until(lambda: httpx.get(site.url + "readyz", timeout=PATIENCE_S).status_code == 200)
        yield site
    finally:
        for denoiser in served.values():
            denoiser.let.set()
        server.should_exit = True
        thread.join(PATIENCE_S)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as site:
        yield site


@pytest.fixture(scope="module")  # no wider: while it exists, this thread can run no other event loop
def chromium() -> Iterator[Browser]:
    path = tool("chromium")
    expect.set_options(timeout=PATIENCE_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def new_context(chromium: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """Make windows with separate storage; any error in their pages fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def make(**options: Any) -> BrowserContext:
        context = chromium.new_context(**{"viewport": DESKTOP, **options})
        context.set_default_timeout(PATIENCE_S * 1000)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
        context.on("request", lambda request: complaints.append(request.url) if is_elsewhere(request.url) else None)
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def page(new_context: Callable[..., BrowserContext]) -> Page:
    return new_context().new_page()


def is_complaint(message: Any) -> bool:
    # Chromium logs every error answer; the tests check how the page handles them
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def is_elsewhere(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))
