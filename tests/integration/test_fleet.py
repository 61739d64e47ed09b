"""Three replicas behind HAProxy and nginx, scraped by Prometheus: processes on loopback, with the files of deploy/.

tests/containers/ does the same with containers, which discover each other by DNS.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.haproxy import Proxy
from tests.integration import proxies
from tests.integration.exact_process import free_port, start, wait_for
from tests.integration.proxies import FRONT_NAME, Prometheus
from tests.observability import REPLICA_METRIC, queries
from tests.waiting import PATIENCE_S, until

REPLICAS = 3
MAXCONN = 32
"""Requests that HAProxy gives to a replica at a time (haproxy.cfg)."""
CALL_S = 0.004
STEPS = 20
LONG_STEPS = 1000
"""Steps of a request that is still running when the test has looked at it: seconds."""
MOST_IMAGES = 64
"""Images of the largest request."""
REQUESTS_THAT_FILL = 4
"""Requests of `MOST_IMAGES` that a replica accepts: 16 rows that run, and 256 that wait, are not enough for another."""
RETRIES = 3
"""Of HAProxy (haproxy.cfg)."""
KEEP_ALIVE_S = 2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "IDDPM_ALLOWED_HOSTS": "*",  # as in compose: the proxies check the Host
    "IDDPM_TRUSTED_PROXIES": "127.0.0.1",
    "IDDPM_KEEP_ALIVE_S": str(KEEP_ALIVE_S),
    "IDDPM_MAX_ROWS": "16",
}


class Replica:
    """A service process that can be ended and started again at the same port."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as output:
            return start(output, "127.0.0.1", self.port, CALL_S, env=os.environ | ENVIRONMENT)

    def wait_ready(self) -> None:
        wait_for(self.process, f"{self.url}/readyz", 200)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def restart(self) -> None:
        self.process = self._start()
        self.wait_ready()

    def count(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@dataclass(frozen=True)
class Fleet:
    """Everything that runs."""

    replicas: Sequence[Replica]
    haproxy: Proxy
    nginx: str
    front: str
    prometheus: Prometheus

    def in_rotation(self) -> int:
        """Return how many replicas HAProxy gives requests to."""
        text = httpx.get(f"{self.haproxy.exporter}/metrics", timeout=PATIENCE_S).text
        return int(sample(text, 'haproxy_backend_active_servers{proxy="generate"}'))


def sample(text: str, name: str) -> float:
    """Return the value of one line of a text of metrics."""
    (value,) = (float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))
    return value


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:

        def folder(name: str) -> Path:
            return tmp_path_factory.mktemp(name)

        replicas = [Replica(folder("replica") / "log") for _ in range(REPLICAS)]
        stack.callback(lambda: [replica.end(signal.SIGKILL) for replica in replicas])
        for replica in replicas:
            replica.wait_ready()
        ports = [replica.port for replica in replicas]
        haproxy = stack.enter_context(proxies.haproxy(folder("haproxy"), ports, hosts=f"127.0.0.1 {FRONT_NAME}"))
        nginx = stack.enter_context(proxies.nginx(folder("nginx"), ports, idle=f"{KEEP_ALIVE_S / 2:g}s"))
        front = stack.enter_context(proxies.front(folder("front"), haproxy))
        targets = {
            "api": [replica.url.removeprefix("http://") for replica in replicas],
            "proxy": [haproxy.exporter.removeprefix("http://")],
        }
        prometheus = stack.enter_context(proxies.prometheus(folder("prometheus"), targets))
        running = Fleet(replicas, haproxy, nginx, front, prometheus)
        until(lambda: running.in_rotation() == REPLICAS)
        yield running


@pytest.fixture(autouse=True)
def whole(fleet: Fleet) -> None:
    """Begin each test with all replicas, which run nothing."""
    until(lambda: fleet.in_rotation() == REPLICAS)
    until(lambda: not any(replica.count("iddpm_images_running") for replica in fleet.replicas))


def client() -> httpx.Client:
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(timeout=PATIENCE_S, limits=limits, trust_env=False, verify=False)  # noqa: S501  # signed by itself


def generate(asking: httpx.Client, url: str, steps: int = STEPS, **headers: str) -> httpx.Response:
    """Request one image as PNG, so that equal images are equal answers."""
    return asking.post(f"{url}/v1/generate", json={"steps": steps}, headers={"Accept": "image/png", **headers})


def through(fleet: Fleet, name: str) -> tuple[str, dict[str, str]]:
    """Return a proxy's URL, and the headers that it needs."""
    url, _, prefix = name.partition("/")
    headers = {"Host": FRONT_NAME} if url == "front" else {}
    return {"haproxy": fleet.haproxy.url, "nginx": fleet.nginx, "front": fleet.front}[url] + prefix, headers


WAYS = ["haproxy", "nginx", "front", "front//generator"]


@pytest.mark.parametrize("way", ["haproxy", "nginx"])
def test_requests_spread_over_the_replicas(fleet: Fleet, way: str) -> None:
    url, _ = through(fleet, way)
    before = [replica.count("iddpm_requests_total") for replica in fleet.replicas]
    with client() as asking, ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: generate(asking, url), range(30)))
    assert {answer.status_code for answer in answers} == {200}
    did = [replica.count("iddpm_requests_total") - count for replica, count in zip(fleet.replicas, before, strict=True)]
    assert sum(did) == 30
    assert min(did) > 0


def test_a_replica_gets_its_maximum_the_rest_wait_at_the_proxy_and_other_routes_answer(fleet: Fleet) -> None:
    def waiting() -> float:
        text = httpx.get(f"{fleet.haproxy.exporter}/metrics", timeout=PATIENCE_S).text
        most = [
            sample(text, f'haproxy_server_max_sessions{{proxy="generate",server="api-{number}"}}')
            for number in range(1, REPLICAS + 1)
        ]
        assert max(most) <= MAXCONN
        return sample(text, 'haproxy_backend_current_queue{proxy="generate"}')

    number = REPLICAS * MAXCONN + 24
    with client() as asking, ThreadPoolExecutor(number) as pool:
        asked = [pool.submit(generate, asking, fleet.haproxy.url, 4 * STEPS) for _ in range(number)]
        until(waiting)
        assert asking.get(f"{fleet.haproxy.url}/v1/models").status_code == 200
        assert {answer.result().status_code for answer in asked} == {200}
    assert waiting() == 0


def test_what_full_replicas_refuse_runs_on_another_and_if_all_are_full_the_client_gets_retry_after(
    fleet: Fleet,
) -> None:
    def refused() -> list[float]:
        return [replica.count('iddpm_requests_total{outcome="rejected"}') for replica in fleet.replicas]

    def ask(url: str) -> httpx.Response:
        return asking.post(f"{url}/v1/generate", json={"steps": 2, "n": MOST_IMAGES})

    def is_answered_after_refusals_by_all(full: int) -> bool:
        assert ask(fleet.haproxy.url).status_code == 200
        return all(now > then for now, then in zip(refused()[:full], before[:full], strict=True))

    with client() as asking, ExitStack() as running:
        for full, replica in enumerate(fleet.replicas, 1):
            for _ in range(REQUESTS_THAT_FILL):
                assert running.enter_context(long_running(asking, replica.url)) == 200
            before = refused()
            if full < REPLICAS:
                until(partial(is_answered_after_refusals_by_all, full))
        for url, asked in ((fleet.haproxy.url, 1 + RETRIES), (fleet.nginx, 1)):  # nginx repeats no POST
            before = refused()
            answer = ask(url)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:iddpm:queue-full")
            assert int(answer.headers["Retry-After"]) > 0
            assert sum(refused()) - sum(before) == asked


@contextmanager
def long_running(asking: httpx.Client, url: str) -> Iterator[int]:
    """Send a request of many images and steps; yield its status while it runs."""
    body = {"steps": LONG_STEPS, "n": MOST_IMAGES, "stream": True, "priority": "batch"}  # batch: may wait for long
    with asking.stream("POST", f"{url}/v1/generate", json=body) as answer:
        yield answer.status_code


def test_two_replicas_that_are_full_with_few_requests_keep_others_from_a_third(fleet: Fleet) -> None:
    third = fleet.replicas[2]
    before = third.count("iddpm_requests_total")
    with client() as asking, ExitStack() as running:
        for full in fleet.replicas[:2]:
            for _ in range(REQUESTS_THAT_FILL):
                assert running.enter_context(long_running(asking, full.url)) == 200
        assert running.enter_context(long_running(asking, fleet.haproxy.url)) == 200
        answer = asking.post(f"{fleet.haproxy.url}/v1/generate", json={"steps": 2, "n": MOST_IMAGES})
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:iddpm:queue-full")
    until(lambda: third.count("iddpm_requests_total") == before + 1)  # the long one: it was not asked for the other


def test_replicas_with_a_queue_for_all_that_the_proxy_gives_them_refuse_nothing(fleet: Fleet, tmp_path: Path) -> None:
    """The numbers of compose have this relation (tests/unit/test_deploy.py); here the proxy gives a replica less."""

    def refused() -> float:
        return sum(replica.count('iddpm_requests_total{outcome="rejected"}') for replica in fleet.replicas)

    def metric(name: str) -> float:
        return sample(httpx.get(f"{proxy.exporter}/metrics", timeout=PATIENCE_S).text, f'{name}{{proxy="generate"}}')

    def fewer(config: str) -> str:
        assert config.count(f" maxconn {MAXCONN}\n") == 1
        return config.replace(f" maxconn {MAXCONN}\n", f" maxconn {REQUESTS_THAT_FILL}\n")

    before = refused()
    ports = [replica.port for replica in fleet.replicas]
    with proxies.haproxy(tmp_path, ports, edit=fewer) as proxy, client() as asking, ThreadPoolExecutor(1) as pool:
        until(lambda: metric("haproxy_backend_active_servers") == REPLICAS)
        with ExitStack() as running:
            for _ in range(REPLICAS * REQUESTS_THAT_FILL):
                assert running.enter_context(long_running(asking, proxy.url)) == 200
            waiting = pool.submit(generate, asking, proxy.url, 2)
            until(lambda: metric("haproxy_backend_current_queue") == 1)
        assert waiting.result().status_code == 200
    assert refused() == before


@pytest.mark.parametrize("way", WAYS)
def test_events_arrive_when_they_are_sent_and_closing_frees_the_rows(fleet: Fleet, way: str) -> None:
    url, headers = through(fleet, way)

    def cancelled() -> float:
        return sum(replica.count('iddpm_requests_total{outcome="cancelled"}') for replica in fleet.replicas)

    before = cancelled()
    body = {"steps": LONG_STEPS, "stream": True}
    with client() as asking, asking.stream("POST", f"{url}/v1/generate", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        names = (line.partition(": ")[2] for line in answer.iter_lines() if line.startswith("event: "))
        assert next(name for name in names if name != "queued") == "progress"
        assert sum(replica.count("iddpm_images_running") for replica in fleet.replicas) == 1
    until(lambda: cancelled() == before + 1)
    until(lambda: not any(replica.count("iddpm_images_running") for replica in fleet.replicas))


@pytest.mark.parametrize("way", ["haproxy", "nginx"])
def test_kept_connections_never_meet_one_that_is_being_closed(fleet: Fleet, way: str) -> None:
    url, _ = through(fleet, way)
    idle_s = KEEP_ALIVE_S / 2

    def ask(number: int) -> set[int]:
        with client() as asking:
            statuses = set()
            for pause in range(4):  # just before and after the times at which either side closes
                statuses.add(generate(asking, url, 2).status_code)
                statuses.add(asking.get(f"{url}/v1/models").status_code)
                time.sleep(idle_s * (0.95 + 0.05 * pause) + 0.02 * number)
            return statuses

    with ThreadPoolExecutor(8) as pool:
        assert set().union(*pool.map(ask, range(8))) == {200}


def test_nginx_reuses_its_connections(tmp_path: Path) -> None:
    class Stub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        connections: list[int] = []  # noqa: RUF012  # of all handlers

        def setup(self) -> None:
            super().setup()
            self.connections.append(0)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815  # not used

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as replica:
        threading.Thread(target=replica.serve_forever).start()
        try:
            with proxies.nginx(tmp_path, [replica.server_port]) as url, client() as asking:
                before = len(Stub.connections)
                assert {generate(asking, url).status_code for _ in range(50)} == {200}
                assert len(Stub.connections) - before <= 2 * (os.cpu_count() or 1)  # each worker keeps its own
        finally:
            replica.shutdown()


def test_a_rolling_restart_loses_no_request(fleet: Fleet) -> None:
    stop = threading.Event()

    def ask(_: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        with client() as asking:
            while not stop.wait(0.1):  # so that replicas are idle, and end at once when they are told to
                statuses[generate(asking, fleet.haproxy.url).status_code] += 1
                statuses[asking.get(f"{fleet.haproxy.url}/v1/models").status_code] += 1
        return statuses

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(6)]
        try:
            for replica in fleet.replicas:
                assert replica.end(signal.SIGTERM) == 0
                replica.restart()
                until(lambda: fleet.in_rotation() == REPLICAS)
        finally:
            stop.set()
    total = sum((statuses.result() for statuses in asked), Counter())
    assert set(total) == {200}, total


def test_a_killed_replica_fails_only_what_it_ran_and_a_retry_gives_the_same_bytes(fleet: Fleet) -> None:
    keys = [f"killed-{number}" for number in range(9)]
    victim = fleet.replicas[0]
    with client() as asking, ThreadPoolExecutor(len(keys)) as pool:

        def ask(url: str, key: str) -> httpx.Response:
            return generate(asking, url, LONG_STEPS // 4, **{"Idempotency-Key": key})

        asked: list[Future[httpx.Response]] = [
            pool.submit(generate, asking, fleet.haproxy.url, LONG_STEPS // 4, **{"Idempotency-Key": key})
            for key in keys
        ]
        until(lambda: sum(replica.count("iddpm_images_running") for replica in fleet.replicas) == len(keys))
        ran = victim.count("iddpm_images_running")
        assert victim.end(signal.SIGKILL) == -signal.SIGKILL
        first = [answer.result() for answer in asked]
        assert Counter(answer.status_code for answer in first) == {200: len(keys) - ran, 502: ran}
        assert ran > 0
        other = fleet.replicas[1]
        for key, answer in zip(keys, first, strict=True):
            again = ask(fleet.haproxy.url, key)
            elsewhere = ask(other.url, key)
            assert (again.status_code, elsewhere.status_code) == (200, 200)
            assert again.content == elsewhere.content
            assert answer.status_code == 502 or answer.content == again.content
    victim.restart()


def test_prometheus_counts_what_clients_counted(fleet: Fleet) -> None:
    names = {
        "ok": 'sum(iddpm_requests_total{outcome="ok"})',
        "invalid": 'sum(iddpm_requests_total{outcome="invalid"})',
        "images": "sum(iddpm_images_total)",
        "latencies": "sum(iddpm_request_duration_seconds_count)",
        "proxied": 'sum(haproxy_backend_http_responses_total{proxy="generate"})',
    }

    def counted() -> dict[str, float]:
        return {name: fleet.prometheus.one(query) or 0 for name, query in names.items()}

    def settled() -> bool:
        requests = sum(replica.count("iddpm_requests_total") for replica in fleet.replicas)
        return fleet.prometheus.one("sum(iddpm_requests_total)") == requests

    until(settled)
    time.sleep(1.5)  # the proxy's last scrape
    before = counted()

    def ask(number: int) -> tuple[int, int]:
        wanted = {"n": number % 3 + 1, "steps": 5} if number % 4 else {"steps": 1}
        with client() as asking:
            answer = asking.post(f"{fleet.haproxy.url}/v1/generate", json=wanted)
        return answer.status_code, len(answer.json()["images"]) if answer.status_code == 200 else 0

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(ask, range(40)))
    statuses = Counter(status for status, _ in got)
    assert statuses == {200: 30, 422: 10}
    clients = {
        "ok": 30,
        "invalid": 10,
        "images": sum(images for _, images in got),
        "latencies": 30,
        "proxied": 40,
    }
    until(lambda: {name: value - before[name] for name, value in counted().items()} == clients)


def test_every_query_of_the_dashboard_returns_data_and_every_rule_works(fleet: Fleet) -> None:
    with client() as asking:

        def is_recorded() -> bool:
            assert generate(asking, fleet.haproxy.url).status_code == 200
            return bool(fleet.prometheus.one("sum(instance:iddpm_images:rate1m)"))

        until(is_recorded)
        shown = fleet.prometheus.get("label/instance/values", **{"match[]": REPLICA_METRIC})
        assert sorted(shown) == sorted(replica.url.removeprefix("http://") for replica in fleet.replicas)
        for query in dict.fromkeys([*queries(), *queries(shown[0])]):

            def has_data(query: str = query) -> bool:
                assert generate(asking, fleet.haproxy.url).status_code == 200
                return any(map(math.isfinite, fleet.prometheus.query(query)))

            until(has_data)
    ready = next(query for query in queries(shown[0]) if query.startswith(f"sum({REPLICA_METRIC}"))
    assert fleet.prometheus.one(ready) == 1
    rules = [rule for group in fleet.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert rules
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_the_page_and_the_interfaces_work_below_a_prefix_over_tls(fleet: Fleet) -> None:
    headers = {"Host": FRONT_NAME}
    with client() as asking:
        for prefix in ("", "/generator"):
            base = fleet.front + prefix
            assert "<html" in asking.get(f"{base}/", headers=headers).text
            document = asking.get(f"{base}/openapi.json", headers=headers).json()
            assert document["servers"][0]["url"] == "."
            assert generate(asking, base, 2, **headers).content.startswith(b"\x89PNG")
            assert asking.get(f"{base}/v2/health/ready", headers=headers).status_code == 200
            for hidden in ("metrics", "readyz"):
                assert asking.get(f"{base}/{hidden}", headers=headers).status_code == 404
        moved = asking.get(f"{fleet.front}/generator", headers=headers)
        assert (moved.status_code, moved.headers["location"].endswith("/generator/")) == (308, True)


def test_nginx_answers_only_for_its_names_and_tells_replicas_the_client(fleet: Fleet) -> None:
    with client() as asking:
        assert asking.get(f"{fleet.nginx}/v1/models", headers={"Host": "evil.example"}).status_code == 421
        answer = asking.get(f"{fleet.nginx}/v1/models")
        assert json.loads(answer.content)["data"]
