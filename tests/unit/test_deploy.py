"""The files that users start the service with are consistent with each other and with the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from formats.tensorrt_files import engine_store
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.http.interfaces import generates
from service.metrics import Metrics
from service.requests.generate_request import MAX_IMAGES
from service.settings import Settings
from tests.fakes import CountingRunner, generation, params
from tests.paths import ROOT
from tests.programs import tool
from tests.waiting import PATIENCE_S


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"HOST", "PORT", "MODEL", "MAKEFLAGS"}}
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(config, dict)
    return config


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def copied_sources(dockerfile: list[str]) -> list[str]:
    copies = [line.split()[1:-1] for line in dockerfile if line.startswith("COPY ") and "--from=" not in line]
    return [word for words in copies for word in words if not word.startswith("--")]


def seconds(text: str) -> float:
    """Read a time as written for HAProxy and compose: 500ms, 60s, 15m."""
    match = re.fullmatch(r"(\d+)(ms|s|m)", text)
    assert match is not None, text
    return int(match[1]) * {"ms": 1e-3, "s": 1, "m": 60}[match[2]]


def haproxy_time(keyword: str) -> float:
    match = re.search(rf"^\s*{keyword}\s+(\S+)", (ROOT / "deploy/haproxy/haproxy.cfg").read_text(), re.MULTILINE)
    assert match is not None, keyword
    return seconds(match[1])


def test_only_loopback_is_published(compose: dict[str, Any]) -> None:
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert {name for name, ports in published.items() if ports} == {"proxy", "prometheus"}
    assert not any(service.get("network_mode") for service in compose["services"].values())


def test_replicas_need_no_keys_only_while_they_are_unreachable_from_outside(
    compose: dict[str, Any], dockerfile: list[str]
) -> None:
    environment = compose["services"]["api"]["environment"]
    assert environment["IDDPM_ALLOW_KEYLESS"] == "true"
    assert "IDDPM_KEYS_FILE" in environment  # passed on when set: then keys are required all the same
    assert not [line for line in dockerfile if "ALLOW_KEYLESS" in line and not line.startswith("#")]


def test_mounted_and_built_paths_exist(compose: dict[str, Any]) -> None:
    mounts = [mount.split(":")[0] for service in compose["services"].values() for mount in service.get("volumes", [])]
    for path in mounts:
        assert (ROOT / path).exists() if path.startswith(".") else path in compose["volumes"]
    assert compose["services"]["api"]["build"] == "."


def test_all_files_copied_into_the_image_exist(dockerfile: list[str]) -> None:
    sources = copied_sources(dockerfile)
    missing = [source for source in sources if not (ROOT / source).exists()]
    assert not missing
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == set(sources)


def test_the_image_contains_every_package(dockerfile: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied_sources(dockerfile))


def test_the_image_needs_no_frontend_from_a_registry(dockerfile: list[str]) -> None:
    assert not dockerfile[0].replace(" ", "").startswith("#syntax=")
    assert "STOPSIGNAL SIGTERM" in dockerfile


def test_the_image_is_labelled_as_the_project(dockerfile: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = [line for line in dockerfile if line.startswith("LABEL ")]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', line))
    assert labels.pop("description") in project["description"]
    assert labels == {"title": project["name"], "version": project["version"], "licenses": project["license"]}


@pytest.mark.parametrize("status", [200, 503])
def test_the_image_s_health_is_that_of_the_service(dockerfile: list[str], status: int) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

    (line,) = [line for line in dockerfile if line.startswith("HEALTHCHECK")]
    _, option, code = json.loads(line[line.index("[") :])
    asked: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        server.timeout = PATIENCE_S
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        checked = run(sys.executable, option, code.replace("8000", str(server.server_port)))
        answering.join()
    assert (checked.returncode == 0) == (status == 200), checked.stderr
    assert asked == ["/healthz"]


@pytest.fixture(scope="module")
def gpu_overlay() -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())
    assert isinstance(config, dict)
    return config


def test_the_image_is_by_default_the_one_without_torch(dockerfile: list[str]) -> None:
    stages = [line.split()[1:] for line in dockerfile if line.startswith("FROM ")]
    assert stages[-1] == ["base"]
    assert ["base", "AS", "gpu"] in stages
    last = dockerfile[max(k for k, line in enumerate(dockerfile) if line.startswith("FROM ")) :]
    assert "COPY --from=build /opt/iddpm /opt/iddpm" in last


def test_each_service_of_the_gpu_overlay_has_its_own_gpu(gpu_overlay: dict[str, Any], compose: dict[str, Any]) -> None:
    devices = []
    shared = ("image", "build", "environment", "volumes", "healthcheck")
    first = gpu_overlay["services"]["api"]
    for name, service in gpu_overlay["services"].items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        devices += device["device_ids"]
        assert service["build"]["target"] == "gpu"
        assert {key: service[key] for key in shared} == {key: first[key] for key in shared}
        if name != "api":
            assert name == f"api-gpu{device['device_ids'][0]}"
            assert service["networks"]["default"]["aliases"] == ["api"]
            assert service["extends"] == {"file": "docker-compose.yml", "service": "api"}
    assert devices == [str(number) for number in range(8)]
    assert "api" in compose["services"]
    settings = {f"IDDPM_{name.upper()}" for name in Settings.model_fields}
    assert set(first["environment"]) <= settings


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_profile_starts_one_replica_per_gpu(gpu_overlay: dict[str, Any], gpus: int) -> None:
    started = [
        name
        for name, service in gpu_overlay["services"].items()
        if "profiles" not in service or f"gpus-{gpus}" in service["profiles"]
    ]
    assert started == ["api", *(f"api-gpu{number}" for number in range(1, gpus))]


def test_compiled_kernels_lie_on_a_volume_that_allows_execution(
    gpu_overlay: dict[str, Any], compose: dict[str, Any], dockerfile: list[str]
) -> None:
    volume, folder = gpu_overlay["services"]["api"]["volumes"][0].split(":")
    assert volume in gpu_overlay["volumes"]
    assert not any(folder.startswith(mount) for mount in compose["services"]["api"]["tmpfs"])
    (variables,) = [line for line in dockerfile if line.startswith("ENV TRITON_CACHE_DIR=")]
    folders = [word.partition("=")[2] for word in variables.split() if word.startswith(("TRITON", "TORCH", "CUDA"))]
    assert len(folders) == 3
    assert all(path.startswith(f"{folder}/") for path in folders)
    assert any("g++" in line and f"-g 10001 {folder}" in line for line in dockerfile)  # writable for the user


def test_engines_are_built_on_the_volume_and_not_in_the_read_only_image(
    gpu_overlay: dict[str, Any], compose: dict[str, Any], dockerfile: list[str]
) -> None:
    replica, gpu = compose["services"]["api"], gpu_overlay["services"]["api"]
    assert replica["read_only"]
    variable = re.fullmatch(r"\$\{IDDPM_ENGINES_DIR-(.+)\}", gpu["environment"]["IDDPM_ENGINES_DIR"])
    assert variable is not None
    (in_the_image,) = [word for line in dockerfile for word in line.split() if word.startswith("IDDPM_ENGINES_DIR=")]
    settings = Settings(models=(ROOT / "models/fashion32",), engines_dir=variable[1])
    assert in_the_image == f"IDDPM_ENGINES_DIR={settings.engines_dir}"  # for docker run and Kubernetes

    store = engine_store(Path("/models/fashion32/artifact"), "0" * 64, settings.backend_options().engines_dir)
    volume, folder, *mode = gpu["volumes"][0].split(":")
    assert volume in gpu_overlay["volumes"]  # of docker's local driver, which allows execution
    assert not gpu_overlay["volumes"][volume]
    assert not mode  # writable
    assert store.is_relative_to(folder)
    assert not any(store.is_relative_to(mount) for mount in replica["tmpfs"])
    assert f"VOLUME {folder}" in dockerfile  # a new volume gets the owner of the image's folder


def test_the_gpu_image_can_be_built_with_tensorrt(gpu_overlay: dict[str, Any], dockerfile: list[str]) -> None:
    assert gpu_overlay["services"]["api"]["build"]["args"] == {"GPU_EXTRA": "${GPU_EXTRA:-torch}"}
    assert "ARG GPU_EXTRA=torch" in dockerfile
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("tensorrt", "tensorrt-rtx"):
        assert "iddpm[torch]" in extras[extra]


def test_a_stop_outlasts_the_longest_request(compose: dict[str, Any]) -> None:
    longest = haproxy_time("timeout server")
    assert seconds(compose["services"]["api"]["stop_grace_period"]) > longest
    assert haproxy_time("hard-stop-after") > longest
    assert seconds(compose["services"]["proxy"]["stop_grace_period"]) > haproxy_time("hard-stop-after")


def test_every_setting_reaches_the_replicas(compose: dict[str, Any]) -> None:
    by_the_command = {"models", "host", "port"}
    passed_on = set(compose["services"]["api"]["environment"])
    assert {f"IDDPM_{name.upper()}" for name in set(Settings.model_fields) - by_the_command} <= passed_on


def test_replicas_can_hold_all_requests_that_the_proxy_gives_them(compose: dict[str, Any]) -> None:
    """Otherwise full replicas refuse what another one could accept (tests/integration/test_fleet.py)."""
    queue = re.fullmatch(r"\$\{IDDPM_MAX_QUEUE:-(\d+)\}", compose["services"]["api"]["environment"]["IDDPM_MAX_QUEUE"])
    assert queue is not None
    requests = re.search(
        r"default-server .* maxconn (\d+)$", (ROOT / "deploy/haproxy/haproxy.cfg").read_text(), re.MULTILINE
    )
    assert requests is not None
    rows_per_image = 2  # with classifier-free guidance
    assert int(queue[1]) >= int(requests[1]) * MAX_IMAGES * rows_per_image


def test_replicas_accept_any_host_only_behind_a_proxy_that_checks_it(compose: dict[str, Any]) -> None:
    assert compose["services"]["api"]["environment"]["IDDPM_ALLOWED_HOSTS"] == "*"
    assert "ports" not in compose["services"]["api"]
    config = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    checked = re.search(r"http-request return status 421 .* unless known_host", config)
    chosen = re.search(r"\buse_backend\b", config)
    assert checked is not None
    assert chosen is not None
    assert checked.start() < chosen.start()


def test_the_proxy_queues_generating_routes_only() -> None:
    config = (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    rules = [
        re.findall(r"\{ path_(beg|end) (.*?) \}", rule) for rule in re.findall("use_backend generate if (.*)", config)
    ]

    def queued(path: str) -> bool:
        return any(
            all(
                path.startswith(tuple(p.split())) if kind == "beg" else path.endswith(tuple(p.split()))
                for kind, p in rule
            )
            for rule in rules
        )

    asking = ["/v1/generate", "/v1/images/generations", "/v2/models/m/infer", "/v2/models/m/versions/1/infer"]
    light = ["/v1/models", "/v2", "/v2/health/ready", "/v2/models/m/stats", "/v2/models/m/versions/1", "/healthz", "/"]
    for path in asking + light:
        assert generates("POST", path) == queued(path) == (path in asking)


def test_haproxy_accepts_its_configuration(compose: dict[str, Any]) -> None:
    hosts = re.sub(r"^\$\{ALLOWED_HOSTS:-(.*)\}$", r"\1", compose["services"]["proxy"]["environment"]["ALLOWED_HOSTS"])
    checked = run(tool("haproxy"), "-c", "-f", "deploy/haproxy/haproxy.cfg", ALLOWED_HOSTS=hosts)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_prometheus_accepts_its_configuration() -> None:
    checked = run(tool("promtool"), "check", "config", "deploy/prometheus/prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_finds_no_problems_in_the_metrics() -> None:
    config, metrics = EngineConfig(), Metrics()
    engine = Engine({"m": CountingRunner()}, config, metrics)
    engine.warm_up()
    engine.measure()
    engine.add(generation("r", params(steps=2)), submitted_at=0.0)  # so that every label has values
    while engine.has_work():
        engine.step()
    checked = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=generate_latest(metrics.registry),
        capture_output=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_prometheus_finds_every_replica_and_the_proxy(compose: dict[str, Any], dockerfile: list[str]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    found = {
        (name, job["job_name"], lookup["type"], lookup["port"])
        for job in config["scrape_configs"]
        for lookup in job.get("dns_sd_configs", [])
        for name in lookup["names"]
    }
    assert found == {("api", "api", "A", 8000), ("proxy", "proxy", "A", 8404)}
    assert {name for name, *_ in found} <= set(compose["services"])
    assert "EXPOSE 8000" in dockerfile
    assert "bind :8404" in (ROOT / "deploy/haproxy/haproxy.cfg").read_text()


def test_make_serve_installs_no_more_than_it_needs_and_listens_on_loopback() -> None:
    planned = run(tool("make"), "--dry-run", "--always-make", "serve").stdout
    assert "pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.'" in planned
    assert "torch" not in planned
    with_torch = run(tool("make"), "--dry-run", "--always-make", "serve", "EXTRA=torch").stdout
    assert "pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[torch]'" in with_torch
    assert 'iddpm serve --model "models/fashion32" --host "127.0.0.1" --port "8000"' in planned


def test_make_runs_numerical_tests_again_only_where_the_processor_has_more_than_avx2() -> None:
    again, skipped = (run(tool("make"), "--dry-run", "test-avx2", f"ONLY_AVX2={known}").stdout for known in ("", "yes"))
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in again
    assert "tests/parity/test_networks.py" in again
    assert "pytest" not in skipped
    assert "Skipped: this processor has no instructions beyond AVX2" in skipped


def test_processes_of_the_tests_keep_compiled_modules() -> None:
    for target in ("test", "test-avx2", "test-long", "test-containers"):
        planned = run(tool("make"), "--dry-run", target, "ONLY_AVX2=").stdout
        (line,) = (line for line in planned.splitlines() if "bin/pytest " in line)
        assert "env -u PYTHONDONTWRITEBYTECODE .venv/bin/pytest" in line


def test_make_prints_its_targets_by_default() -> None:
    printed = run(tool("make")).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert re.findall(r"^  ([a-z0-9-]+) ", printed, re.MULTILINE) == phony[1].split()


def test_every_direct_dependency_is_pinned_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in wanted} - {project["name"]}
    names -= {"tensorrt"}  # could not be installed where constraints.txt was made
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = [line.partition("==")[0] for line in lines]
    assert sorted(pinned) == sorted(names)
