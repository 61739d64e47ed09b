"""The options that the HTTP server gets from the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from service.http.server import DrainingServer, serve
from service.settings import Settings

LONGEST_PROXY_S = 120
"""The time for which Caddy keeps an idle connection to a replica; nginx, HAProxy, Traefik and AWS's balancers keep it
for less."""


@pytest.mark.parametrize("settings", [{}, {"keep_alive_s": 620}])
def test_idle_connections_are_kept_for_longer_than_proxies_keep_them(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[DrainingServer] = []

    def run(server: DrainingServer, sockets: list[Any]) -> None:
        servers.append(server)
        for listener in sockets:
            listener.close()

    monkeypatch.setattr(DrainingServer, "run", run)
    assert not serve(FastAPI(), Settings(models=(Path("m"),), port=0, **settings))  # it has not served
    (server,) = servers
    assert server.config.timeout_keep_alive == settings.get("keep_alive_s", 130)
    assert server.config.timeout_keep_alive > LONGEST_PROXY_S
