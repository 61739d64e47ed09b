"""The Ray Serve application in a real cluster of two nodes: two raylets on this machine, a replica on each.

It takes minutes and needs the extra ray, so that only `make test-long` runs it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cli.client import Client
from tests.counts import LONG
from tests.integration.ray_cluster import TwoNodes, free_port, two_nodes
from tests.integration.server import Server, running, scrape
from tests.paths import BUNDLED
from tests.waiting import PATIENCE_S, scaled, until

if not LONG:
    pytest.skip("takes minutes: make test-long", allow_module_level=True)
if TYPE_CHECKING:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig
else:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    serve = pytest.importorskip("ray.serve")
    AutoscalingConfig = pytest.importorskip("ray.serve.config").AutoscalingConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and processes to the garbage collector

WIDTH = 2
ONGOING = 4 * WIDTH
"""Requests that a replica gets at a time."""
QUEUED = 2 * ONGOING
"""Requests that wait at the proxy, or that it is just about to pass on."""
RUNS_LONG = {"steps": 200, "cfg_scale": 1.0}
"""A request that runs for a second or more."""


class Fleet:
    """A cluster with the application, and what the tests do to it."""

    def __init__(self, nodes: TwoNodes, port: int) -> None:
        self.nodes = nodes
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, replicas: int, most: int | None = None) -> None:
        """Run this number of replicas, or up to `most` if there is load; each fills its node."""
        from deploy.ray.serve_app import Fleet as Arguments
        from deploy.ray.serve_app import build

        most = replicas if most is None else most
        arguments = Arguments(min_replicas=replicas, max_replicas=most, cpus=1, max_queued_requests=QUEUED)
        serve.run(build(arguments))
        self.wait_for(replicas)

    def wait_for(self, replicas: int) -> None:
        """Wait until exactly this number of replicas exists, and all run."""
        until(lambda: self.has(replicas), poll_s=0.2)

    def has(self, replicas: int) -> bool:
        """Return whether exactly this number of replicas exists, and all run."""
        (application,) = serve.status().applications.values()
        return dict(application.deployments["iddpm"].replica_states) == {"RUNNING": replicas}

    def ask(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/generate", json=body, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with (
        two_nodes(
            tmp_path_factory,
            IDDPM_MODELS=str(BUNDLED),
            IDDPM_ALLOW_KEYLESS="true",
            IDDPM_MAX_ROWS=str(WIDTH),
            RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING="0",  # both replicas get requests at any load
            RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=str(scaled(5)),
            RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=str(scaled(10)),
        ) as nodes,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", PATIENCE_S)
        port = free_port()
        fleet = Fleet(nodes, port)
        try:
            ray.init(address=nodes.address, log_to_driver=False)
            serve.start(proxy_location="HeadOnly", http_options={"port": port})
            fleet.deploy(2)
            yield fleet
            serve.shutdown()
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same service without Ray."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with running(BUNDLED, log, "--threads", "1", environment={"IDDPM_MAX_ROWS": str(WIDTH)}) as server:
        yield server


def answers(url: str, numbers: range, done: list[int] | None = None) -> dict[int, tuple[str, list[str]]]:
    """Send many different requests, with retries; return the numerics and the images of each.

    The requests have no seed: their Idempotency-Key gives them one.

    Args:
        url: of the service.
        numbers: numbers of the requests.
        done: gets the number of each finished request.
    """

    def one(number: int) -> tuple[int, tuple[str, list[str]]]:
        key, fields = f"request-{number}", {"class": number % 10, "steps": 20 + number % 7, "n": 1 + number % 2}
        with Client(url, patience_s=PATIENCE_S) as client:
            answer = client.generate(idempotency_key=key, **fields)  # type: ignore[arg-type]  # class is a keyword
        if done is not None:
            done.append(number)
        return number, (answer.numerics_id, [image.b64_json for image in answer.images])

    with ThreadPoolExecutor(max_workers=2 * ONGOING) as pool:
        return dict(pool.map(one, numbers))


def test_a_node_dies_under_load_no_request_is_lost_and_a_new_node_takes_over(
    fleet: Fleet, plain: Server, caplog: pytest.LogCaptureFixture
) -> None:
    numbers, done = range(48), list[int]()
    caplog.set_level("INFO", "cli.retries")

    def kill() -> None:
        until(lambda: len(done) >= len(numbers) // 4)
        fleet.nodes.kill_node()

    killer = threading.Thread(target=kill)
    killer.start()
    found = answers(fleet.url, numbers, done)
    killer.join()
    assert found == answers(plain.url, numbers)
    retried = Counter(record.getMessage().partition(";")[0] for record in caplog.records)
    assert retried["answered 500"] > 0  # the node was computing when it died
    assert set(retried) <= {"answered 500", "answered 503"}

    fleet.nodes.add_node()
    fleet.wait_for(2)
    more = range(len(numbers), len(numbers) + 32)
    assert answers(fleet.url, more) == answers(plain.url, more)
    answered = set[float]()  # by each replica; one of the two tells

    def both_told() -> bool:
        answered.add(scrape(fleet.url)["iddpm_requests_total ok"])
        return len(answered) == 2

    until(both_told)
    assert 0 < min(answered) < len(more) < max(answered)


def test_a_replica_that_is_removed_finishes_its_requests(fleet: Fleet) -> None:
    fleet.wait_for(2)
    begun = list[int]()

    def follow(seed: int) -> str:
        body = {"seed": seed, "stream": True, **RUNS_LONG}
        kinds = list[str]()
        with httpx.stream("POST", f"{fleet.url}/v1/generate", json=body, timeout=PATIENCE_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kinds.append(line.removeprefix("event: "))
                    if len(kinds) == 1:
                        begun.append(seed)
        assert "progress" in kinds
        return kinds[-1]

    with ThreadPoolExecutor(max_workers=ONGOING) as pool:
        ends = pool.map(follow, range(ONGOING))
        until(lambda: len(begun) == ONGOING)
        fleet.deploy(1)
        assert set(ends) == {"completed"}
    assert fleet.ask(seed=1, steps=2).status_code == 200


def test_a_client_that_disconnects_frees_its_rows(fleet: Fleet) -> None:
    fleet.deploy(1)
    before = scrape(fleet.url)["iddpm_requests_total cancelled"]
    body = {"steps": 1000, "n": 16}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fleet.url}/v1/generate", json=body, timeout=2)
    with httpx.stream("POST", f"{fleet.url}/v1/generate", json={**body, "stream": True}, timeout=PATIENCE_S) as answer:
        next(answer.iter_bytes())
    until(lambda: scrape(fleet.url)["iddpm_requests_total cancelled"] == before + 2)
    until(lambda: scrape(fleet.url)["iddpm_images_running"] == 0)


def test_more_requests_than_fit_are_refused_with_retry_after(fleet: Fleet) -> None:
    fleet.deploy(1)
    sent = 3 * (ONGOING + QUEUED)
    with ThreadPoolExecutor(max_workers=sent) as pool:
        found = list(pool.map(lambda seed: fleet.ask(seed=seed, **RUNS_LONG), range(sent)))
    statuses = Counter(answer.status_code for answer in found)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= QUEUED  # places become free while requests arrive
    assert {answer.headers.get("retry-after") for answer in found if answer.status_code == 503} == {"10"}


def test_refusals_of_the_service_arrive_unchanged(fleet: Fleet) -> None:
    fleet.deploy(1)
    answer = fleet.ask(steps=1000, n=16, deadline_s=0.1)
    assert answer.status_code == 422
    assert "deadline_s" in answer.json()["detail"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_replicas_follow_the_load_and_no_request_is_lost(
    fleet: Fleet, plain: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "cli.retries")
    often = {"metrics_interval_s": 0.5, "look_back_period_s": 2.0, "upscale_delay_s": 1.0, "downscale_delay_s": 3.0}
    monkeypatch.setattr("deploy.ray.serve_app.AutoscalingConfig", partial(AutoscalingConfig, **often))
    found = dict[int, tuple[str, list[str]]]()

    def ask_until_there_are(replicas: int, at_a_time: int) -> None:
        def there() -> bool:
            found.update(answers(fleet.url, range(len(found), len(found) + at_a_time)))
            return fleet.has(replicas)

        until(there)

    fleet.deploy(1, most=2)  # and without load, one that was there before goes
    ask_until_there_are(2, at_a_time=2 * ONGOING)
    ask_until_there_are(1, at_a_time=1)
    assert found == answers(plain.url, range(len(found)))
    assert [record.getMessage() for record in caplog.records if record.name == "cli.retries"] == []  # none sent twice
