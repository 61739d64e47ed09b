"""The proxy of deploy/ on loopback: no test here starts a process."""

from __future__ import annotations

import pytest

from benchmarks.haproxy import CONFIG, proxy_config


def test_the_proxy_gets_the_addresses_of_the_replicas_and_is_otherwise_that_of_the_repository() -> None:
    text = CONFIG.read_text(encoding="utf-8")
    ours = text.splitlines()
    lines = proxy_config(text, "127.0.0.1:7000", "127.0.0.1:7001", [7002, 7003], [7004]).splitlines()
    changed = [line.strip() for line in lines if line not in ours]
    generate = ["server api-1 127.0.0.1:7002", "server api-2 127.0.0.1:7003"]
    binds = ["bind 127.0.0.1:7000", "bind 127.0.0.1:7001"]
    assert sorted(changed) == sorted([*binds, *generate, "server api-1 127.0.0.1:7004"])
    assert len(lines) == len(ours) + 1
    backend = "\n".join(lines).partition("\nbackend generate\n")[2].partition("\nbackend light\n")[0]
    assert all(server in backend for server in generate)


def test_a_configuration_without_the_expected_lines_is_refused() -> None:
    text = CONFIG.read_text(encoding="utf-8").replace("server-template api- 32", "server-template api- 64")
    with pytest.raises(ValueError, match=r"must have the line 'server-template api- 32 .*' 2 times"):
        proxy_config(text, ":7000", ":7001", [7002], [7002])
