"""The real Dockerfile and compose file: three replicas in containers, under load, killed, restarted and scaled down.

    make test-containers          docker, its compose plugin or docker-compose, and promtool

tests/integration/test_fleet.py does the same with processes on loopback, which needs no docker and runs in CI.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.exact_process import free_port
from tests.integration.proxies import Prometheus
from tests.observability import alert_names, queries
from tests.paths import ROOT
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.skipif("IDDPM_TEST_CONTAINERS" not in os.environ, reason="minutes: make test-containers")

REPLICAS = 3
CLIENTS = 4
LARGEST_IMAGE = 900 * 10**6
MIX: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 10, "n": 2, "class": ["sneaker", "bag"]},
    {"steps": 8, "sampler": "dpm++", "cfg_scale": 1},
    {"steps": 6, "sampler": "ddim", "n": 3},
]
"""Requests that take a fraction of a second."""
LONG = {"steps": 1000, "cfg_scale": 1}
"""Still running when Prometheus scrapes its replica."""


@dataclass(frozen=True)
class Stack:
    """The running services of the compose file."""

    url: str
    prometheus: Prometheus
    compose: Callable[..., str]

    def replicas(self) -> list[str]:
        """Return the ids of the replicas' containers, running or not."""
        return self.compose("ps", "-q", "api").split()

    def in_rotation(self) -> float | None:
        """Return how many replicas the proxy gives requests to, by its own metrics."""
        return self.prometheus.one('haproxy_backend_active_servers{proxy="generate"}')


def run(*command: str, **options: Any) -> str:
    """Run a command; return its output, or fail with it."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    done = subprocess.run(command, text=True, timeout=4 * PATIENCE_S, check=False, **options)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr or ''}"
    return str(done.stdout)


def docker(*arguments: str) -> str:
    return run("docker", *arguments)


def compose_command() -> list[str]:
    plugin = [str(shutil.which("docker")), "compose"]
    has_plugin = subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0
    return plugin if has_plugin else ["docker-compose"]


def compose_of(project: str, **environment: str) -> Callable[..., str]:
    """Return a function that runs compose with these variables."""
    command, variables = compose_command(), {**os.environ, **environment, "COMPOSE_PROJECT_NAME": project}

    def compose(*arguments: str) -> str:
        return run(*command, *arguments, cwd=ROOT, env=variables, stderr=subprocess.PIPE)

    return compose


@pytest.fixture(scope="module")
def image() -> str:
    """Build the image of compose."""
    if shutil.which("docker") is None:
        pytest.fail("docker is not installed")
    run("docker", "build", "-t", "iddpm", ".", cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    return "iddpm"


@pytest.fixture(scope="module")
def stack(image: str) -> Iterator[Stack]:
    ports = {"PROXY_PORT": str(free_port()), "PROMETHEUS_PORT": str(free_port())}
    compose = compose_of("iddpm-test", IDDPM_THREADS="1", **ports)
    try:
        compose("up", "-d", "--no-build", "--scale", f"api={REPLICAS}")
        url = f"http://127.0.0.1:{ports['PROXY_PORT']}"
        running = Stack(url, Prometheus(f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}"), compose)
        until(lambda: _status(f"{url}/v1/models") == 200, poll_s=0.5)
        until(lambda: _holds(lambda: running.in_rotation() == REPLICAS), poll_s=0.5)
        yield running
        print(compose("logs", "--no-color", "--tail", "20"))  # noqa: T201  # shown if a test failed
    finally:
        compose("down", "-v", "-t", "30")


OVERLAYS = {"observability": (), "gpu": ("gpus-2", "gpus-4", "gpus-8")}
"""The profiles of each overlay."""
COMBINATIONS = [
    pytest.param(names, profile, id="-".join([*names, *([profile] if profile else [])]) or "plain")
    for count in range(len(OVERLAYS) + 1)
    for names in combinations(OVERLAYS, count)
    for profile in (None, *(profile for name in names for profile in OVERLAYS[name]))
]


def config_of(names: Sequence[str], profile: str | None, *arguments: str) -> str:
    """Run `config` on the compose file with these overlays."""
    if shutil.which("docker") is None:
        pytest.fail("docker is not installed")
    files = ["docker-compose.yml", *(f"docker-compose.{name}.yml" for name in names)]
    options = [option for file in files for option in ("-f", file)] + (["--profile", profile] if profile else [])
    return run(*compose_command(), *options, "config", *arguments, cwd=ROOT, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("names", "profile"), COMBINATIONS)
def test_compose_accepts_all_its_files_together(names: Sequence[str], profile: str | None) -> None:
    assert config_of(names, profile, "-q") == ""


def test_replicas_on_further_gpus_differ_from_the_first_in_their_gpu_only() -> None:
    services = yaml.safe_load(config_of(("gpu",), "gpus-8"))["services"]
    own = {"deploy", "networks", "profiles"}
    first, *others = (
        {key: value for key, value in service.items() if key not in own}
        for name, service in sorted(services.items())
        if name.startswith("api")
    )
    assert others == [first] * 7
    assert first["read_only"]  # of docker-compose.yml
    assert first["build"]["target"] == "gpu"


def test_rules_and_alerts_pass_their_tests() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is not installed")
    run(promtool, "test", "rules", str(ROOT / "deploy/prometheus/tests/rules.yml"))


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=PATIENCE_S, trust_env=False).status_code
    except httpx.TransportError:
        return None


def _holds(condition: Callable[[], bool]) -> bool:
    """Return whether a condition holds; False while Prometheus does not answer yet."""
    try:
        return condition()
    except (httpx.TransportError, json.JSONDecodeError):
        return False


def client() -> httpx.Client:
    return httpx.Client(timeout=PATIENCE_S, trust_env=False, limits=httpx.Limits(max_connections=None))


def ask(asking: httpx.Client, stack: Stack, body: dict[str, Any], key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return asking.post(f"{stack.url}/v1/generate", json=body, headers=headers)


@contextmanager
def load(stack: Stack) -> Iterator[Counter[int]]:
    """Send mixed requests from several clients; on leaving, wait for their answers. Yields the statuses."""
    stop, statuses, lock = threading.Event(), Counter[int](), threading.Lock()

    def send(number: int) -> None:
        with client() as asking:
            while not stop.is_set():
                status = ask(asking, stack, MIX[number % len(MIX)]).status_code
                with lock:
                    statuses[status] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        sent = [pool.submit(send, number) for number in range(CLIENTS)]
        try:
            yield statuses
        finally:
            stop.set()
        for one in sent:
            one.result()


def settled(stack: Stack, replicas: Sequence[str]) -> None:
    """Wait until the proxy gives requests to these replicas."""
    until(lambda: stack.in_rotation() == len(replicas), poll_s=0.5)


@pytest.mark.parametrize("cpus", ["0", "0.5", "1", "1.5"])
def test_threads_follow_the_quota_of_the_replica_s_cgroup(image: str, cpus: str) -> None:
    compose = compose_of("iddpm-quota", REPLICA_CPUS=cpus)
    try:
        compose("up", "-d", "--no-build", "api")
        (replica,) = compose("ps", "-q", "api").split()

        def start_up() -> dict[str, Any] | None:
            lines = map(json.loads, docker("logs", replica).splitlines())
            return next((line["start_up"] for line in lines if "start_up" in line), None)

        until(start_up, poll_s=0.5)
        facts = start_up()
        assert facts is not None
    finally:
        compose("down", "-v", "-t", "30")
    here = len(os.sched_getaffinity(0))
    usable = here if cpus == "0" else min(here, math.ceil(float(cpus)))
    quota = "no cgroup quota" if cpus == "0" else f"a cgroup quota of {cpus}"
    assert facts["processors"] == f"{usable} usable (affinity {here}, {quota})"
    assert [model["threads"] for model in facts["models"]] == [usable]


def test_the_image_is_small_labelled_and_runs_without_rights(stack: Stack) -> None:
    (image,) = json.loads(docker("image", "inspect", "iddpm"))
    assert image["Size"] < LARGEST_IMAGE
    assert image["Config"]["User"] not in ("", "0", "root")
    assert {"org.opencontainers.image.title", "org.opencontainers.image.licenses"} <= image["Config"]["Labels"].keys()
    (container,) = json.loads(docker("inspect", stack.replicas()[0]))
    assert container["HostConfig"]["ReadonlyRootfs"]
    assert container["HostConfig"]["CapDrop"] == ["ALL"]
    log = docker("logs", stack.replicas()[0]).splitlines()
    assert all(isinstance(json.loads(line), dict) for line in log)
    assert any("is ready" in line for line in log)


def test_prometheus_counts_what_mixed_clients_counted(stack: Stack) -> None:
    counts = {
        "ok": 'sum(iddpm_requests_total{outcome="ok"})',
        "images": "sum(iddpm_images_total)",
        "proxied": 'sum(haproxy_backend_http_responses_total{proxy="generate"})',
    }
    before = {name: stack.prometheus.one(query) or 0 for name, query in counts.items()}

    def send(number: int) -> int:
        with client() as asking:
            answer = ask(asking, stack, MIX[number % len(MIX)])
        assert answer.status_code == 200, answer.text
        return len(answer.json()["images"])

    with ThreadPoolExecutor(CLIENTS) as pool:
        images = list(pool.map(send, range(40)))
    clients = {"ok": 40, "images": sum(images), "proxied": 40}
    until(
        lambda: {name: (stack.prometheus.one(query) or 0) - before[name] for name, query in counts.items()} == clients,
        poll_s=1,
    )
    each = stack.prometheus.query('sum by (instance) (iddpm_requests_total{outcome="ok"})')
    assert len(each) == REPLICAS
    assert min(each) > 0


def test_every_query_of_the_dashboard_returns_data_and_every_rule_works(stack: Stack) -> None:
    with load(stack):
        for query in queries():

            def has_data(query: str = query) -> bool:
                return any(map(math.isfinite, stack.prometheus.query(query)))

            until(has_data, poll_s=1)
    rules = [rule for group in stack.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert set(alert_names()) <= {rule["name"] for rule in rules}


def test_a_killed_replica_fails_only_what_it_ran_and_retries_give_the_same_bytes(stack: Stack) -> None:
    replicas = stack.replicas()
    keys = [f"killed-{number}" for number in range(6)]
    with client() as asking, ThreadPoolExecutor(len(keys)) as pool:
        sent = [pool.submit(ask, asking, stack, LONG, key) for key in keys]
        until(lambda: (stack.prometheus.one("sum(iddpm_images_running)") or 0) >= len(keys), poll_s=0.2)
        docker("kill", "-s", "KILL", replicas[0])
        first = [answer.result() for answer in sent]
        statuses = Counter(answer.status_code for answer in first)
        assert set(statuses) == {200, 502}, statuses
        assert statuses[502] <= 2 * len(keys) // REPLICAS  # least connections: a third, unless the proxy had others
        for key, answer in zip(keys, first, strict=True):
            again = ask(asking, stack, LONG, key)
            assert again.status_code == 200
            elsewhere = ask(asking, stack, LONG, key)
            pixels = [image["b64_json"] for image in again.json()["images"]]
            assert pixels == [image["b64_json"] for image in elsewhere.json()["images"]]
            if answer.status_code == 200:
                assert pixels == [image["b64_json"] for image in answer.json()["images"]]
    docker("start", replicas[0])
    settled(stack, replicas)


def test_a_restarted_replica_loses_no_request(stack: Stack) -> None:
    replicas = stack.replicas()
    with load(stack) as statuses:
        docker("restart", "-t", "600", replicas[1])
        settled(stack, replicas)
    assert set(statuses) == {200}, statuses
    assert sum(statuses.values()) > CLIENTS


def test_scaling_down_loses_no_request(stack: Stack) -> None:
    with load(stack) as statuses:
        stack.compose("up", "-d", "--no-build", "--no-recreate", "--scale", "api=2")
        until(lambda: stack.in_rotation() == 2, poll_s=0.5)
    assert set(statuses) == {200}, statuses
    until(lambda: stack.prometheus.one('sum(up{job="api"})') == 2, poll_s=1)
