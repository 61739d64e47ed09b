"""Who may send requests, how many, and what no request can do: keys, limits, hostile bodies, origins, secrets, logs."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.door.idempotency import derived_seed
from service.http.door.keys import ApiKey, Limits, hash_of, new_key
from service.http.door.keys_file import write_keys
from service.http.door.security_headers import SECURITY_HEADERS
from tests.fakes import tiny_checkpoint
from tests.integration.in_process import Service, running
from tests.integration.server import Server
from tests.integration.server import running as running_process
from tests.waiting import PATIENCE_S, runs

SHORT: dict[str, Any] = {"cfg_scale": 1, "steps": 3}
JSON = {"Content-Type": "application/json"}


class Keys:
    """A keys file, and the keys that it contains by hash only."""

    def __init__(self, folder: Path, **limits: Limits) -> None:
        self.path = folder / "keys.json"
        self.keys = {name: new_key() for name in limits}
        self._limits = limits
        self.write(*limits)

    def write(self, *names: str) -> None:
        write_keys(
            self.path,
            [ApiKey(name=name, sha256=hash_of(self.keys[name]), limits=self._limits[name]) for name in names],
        )

    def of(self, name: str, **headers: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}", **headers}


async def generate(service: Service, headers: dict[str, str], peer: str = "192.0.2.1", **body: Any) -> httpx.Response:
    return await service.ask("POST", "/v1/generate", peer, json=SHORT | body, headers=headers)


async def accepted(service: Service, headers: dict[str, str], requests: int) -> None:
    """Wait until this number of requests has been accepted since the start; the engine may be paused meanwhile."""

    async def counted() -> bool:
        text = (await service.ask("GET", "/metrics", headers=headers)).text
        return f"iddpm_predicted_wait_seconds_count {requests:.1f}" in text

    await service.until(counted)


def test_requests_need_a_key_and_health_needs_none(tmp_path: Path) -> None:
    keys = Keys(tmp_path, alice=Limits())

    @runs
    async def check() -> None:
        async with running(keys_file=keys.path) as service:
            for method, path in [
                ("POST", "/v1/generate"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere"),
            ]:  # fmt: skip
                body: dict[str, Any] = {"json": SHORT} if method == "POST" else {}
                without = await service.ask(method, path, **body)
                assert (without.status_code, without.json()["title"]) == (401, "Unauthorized")
                assert without.headers["www-authenticate"] == 'Bearer realm="iddpm"'
                for wrong in (f"Bearer {new_key()}", "Bearer ", "Basic x", keys.keys["alice"], "Bearer \xe4"):
                    headers = {"Authorization": wrong.encode("latin-1")}
                    refused = await service.ask(method, path, headers=headers, **body)
                    assert refused.status_code == 401
                    assert refused.headers["www-authenticate"].endswith('error="invalid_token"')
            assert (await service.ask("GET", "/healthz")).status_code == 200
            assert (await service.ask("GET", "/readyz")).status_code == 200
            assert (await generate(service, keys.of("alice"))).status_code == 200
            assert (await service.ask("GET", "/metrics", headers=keys.of("alice"))).status_code == 200
            assert (await service.ask("GET", "/nowhere", headers=keys.of("alice"))).status_code == 404

    check()


def test_keys_are_added_and_taken_back_while_the_service_runs(tmp_path: Path) -> None:
    keys = Keys(tmp_path, alice=Limits(), bob=Limits())

    @runs
    async def check() -> None:
        async with running(keys_file=keys.path) as service:
            for names in (["alice"], ["bob"], ["alice", "bob"], []):
                keys.write(*names)
                for name in ("alice", "bob"):
                    answer = await service.ask("GET", "/v1/models", headers=keys.of(name))
                    assert answer.status_code == (200 if name in names else 401)

    check()


def test_a_key_limits_its_own_images_in_flight_and_work(tmp_path: Path) -> None:
    keys = Keys(
        tmp_path,
        alice=Limits(images_in_flight=2, row_steps_per_request=20),
        bob=Limits(),
        watcher=Limits(images_in_flight=0),
    )

    @runs
    async def check() -> None:
        async with running(keys_file=keys.path) as service:
            service.denoiser.let.clear()
            asked = [asyncio.create_task(generate(service, keys.of("alice"))) for _ in range(2)]
            await accepted(service, keys.of("watcher"), 2)
            refused = await generate(service, keys.of("alice"), peer="198.51.100.7")
            assert (refused.status_code, refused.json()["title"]) == (429, "Too many requests")
            assert "2 images of this client are in flight, the limit is 2; " in refused.json()["detail"]
            assert int(refused.headers["retry-after"]) >= 1
            asked.append(asyncio.create_task(generate(service, keys.of("bob"), n=3)))
            await accepted(service, keys.of("watcher"), 3)
            service.denoiser.let.set()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3

            bodies: list[tuple[str, dict[str, Any], str]] = [
                ("alice", {"n": 3}, "n: must be at most 2, the images this client may have in flight; got 3"),
                ("watcher", {}, "n: must be at most 0, the images this client may have in flight; got 1"),
                ("alice", {"steps": 21}, "must be at most 20 per request; got 1 x 21"),
                ("alice", {"steps": 11, "cfg_scale": 2}, "must be at most 20 per request"),
            ]
            for name, body, rule in bodies:
                invalid = await generate(service, keys.of(name), **body)
                assert invalid.status_code == 422
                assert rule in invalid.json()["detail"]
            assert (await generate(service, keys.of("bob"), steps=21)).status_code == 200

    check()


def test_a_key_limits_requests_per_minute_and_reading_is_free(tmp_path: Path) -> None:
    keys = Keys(tmp_path, alice=Limits(requests_per_minute=2), bob=Limits())

    @runs
    async def check() -> None:
        async with running(keys_file=keys.path) as service:
            assert (await generate(service, keys.of("alice"))).status_code == 200
            assert (await generate(service, keys.of("alice"), steps=1)).status_code == 422  # counts as a request, too
            refused = await generate(service, keys.of("alice"))
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            assert (await service.ask("GET", "/v1/models", headers=keys.of("alice"))).status_code == 200
            assert (await generate(service, keys.of("bob"))).status_code == 200
            assert await self_counted(service, keys) == {"ok": 2, "invalid": 1, "rejected": 1}

    async def self_counted(service: Service, keys: Keys) -> dict[str, float]:
        text = (await service.ask("GET", "/metrics", headers=keys.of("bob"))).text
        lines = [line for line in text.splitlines() if line.startswith("iddpm_requests_total{")]
        counts = {line.split('"')[1]: float(line.split()[-1]) for line in lines}
        return {outcome: counts[outcome] for outcome in ("ok", "invalid", "rejected")}

    check()


def test_fairness_is_by_key_not_by_address(tmp_path: Path) -> None:
    keys = Keys(tmp_path, alice=Limits(), bob=Limits())

    @runs
    async def check() -> None:
        async with running(keys_file=keys.path, client_share=0.5) as service:
            service.denoiser.let.clear()
            asked = [asyncio.create_task(generate(service, keys.of("alice"), n=3))]
            await accepted(service, keys.of("bob"), 1)
            assert (await generate(service, keys.of("alice"), peer="198.51.100.7")).status_code == 429
            asked.append(asyncio.create_task(generate(service, keys.of("bob"), n=3)))
            await accepted(service, keys.of("bob"), 2)
            service.denoiser.let.set()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200, 200]

    check()


@runs
async def test_an_idempotency_key_is_one_execution_and_gives_equal_images_on_another_replica() -> None:
    key = {"Idempotency-Key": "order-7"}
    async with running() as service:
        calls = len(service.denoiser.calls)
        service.denoiser.let.clear()
        asked = [asyncio.create_task(generate(service, key, n=2)) for _ in range(10)]
        await accepted(service, {}, 1)
        service.denoiser.let.set()
        answers = await asyncio.gather(*asked)
        assert len(service.denoiser.calls) - calls == SHORT["steps"]
        assert {answer.content for answer in answers} == {answers[0].content}
        assert len({answer.headers["x-request-id"] for answer in answers}) == 10
        first = answers[0].json()["images"]
        assert first[0]["seed"] == derived_seed("192.0.2.1", "order-7")

        assert (await generate(service, key, n=1)).status_code == 422
        theirs = await generate(service, key, peer="198.51.100.7", n=2)
        assert "idempotent-replayed" not in theirs.headers
        assert theirs.json()["images"][0]["b64_json"] != first[0]["b64_json"]
        assert (await generate(service, key | {"Accept": "image/png"}, n=2)).status_code == 422
        assert (await generate(service, {"Idempotency-Key": "other"}, seed=5)).json()["images"][0]["seed"] == 5
    async with running() as replica:
        again = (await generate(replica, key, n=2)).json()["images"]
        assert [image["b64_json"] for image in again] == [image["b64_json"] for image in first]


@runs
async def test_an_idempotent_request_is_aborted_when_all_its_clients_have_left() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        asked = [asyncio.create_task(generate(service, {"Idempotency-Key": "k"}, steps=1000, n=2)) for _ in range(2)]
        await accepted(service, {}, 1)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        service.denoiser.let.set()

        async def free() -> bool:
            return await service.metric("iddpm_remaining_row_steps") == 0

        await service.until(free)
        assert await service.metric("iddpm_wasted_row_steps_total") < 2 * 1000


HOSTILE_BODIES: list[tuple[bytes, int, str]] = [
    (b"", 422, "field required"),
    (b"{", 400, "not valid JSON"),
    (b"\xff\xfe{}", 400, "not valid JSON"),
    (b"\xff", 400, "not UTF-8"),
    (b"null", 422, "body"),
    (b"[]", 422, "body"),
    (b"[" * 60_000, 400, "more than 2000 lists and objects"),
    (b'{"class":[' + b"[]," * 2000 + b"1]}", 400, "more than 2000 lists and objects"),
    (b'{"class":' + b"[" * 1900 + b"]" * 1900 + b"}", 400, "nested too deeply"),
    (b'{"class":' + b'{"a":' * 1900 + b"1" + b"}" * 1900 + b"}", 400, "nested too deeply"),
    (b'{"seed":' + b"1" * 60_000 + b"}", 400, "a number is too long"),
    (b'{"cfg_scale":1e999}', 422, "cfg_scale"),
    (b'{"cfg_scale":NaN}', 422, "cfg_scale"),
    (b'{"\\ud800":1}', 422, "body"),
    (b'{"class":"\\ud800"}', 422, "class"),
    (b'{"model":"\\ud800\\u0000"}', 404, "model"),
    (b'{"n":{}, "steps":[], "seed":"x", "sampler":1}', 422, "n: "),
    (b"{" + b",".join(b'"%d":1' % k for k in range(5000)) + b"}", 422, "must have at most 100 fields; got 5000"),
    (b'{"class":[' + b",".join([b"1.5"] * 64) + b'],"stepz":1}', 422, "stepz: unknown field"),
    (b" " * 9_000_000, 413, "at most 8454144 bytes"),
]


@runs
async def test_hostile_bodies_get_4xx_answers_and_cause_no_work() -> None:
    async with running() as service:
        calls = len(service.denoiser.calls)
        for content, status, message in HOSTILE_BODIES:
            answer = await service.ask("POST", "/v1/generate", content=content, headers=JSON)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
            assert message in answer.json()["detail"], content[:40]
            assert len(answer.content) < 5000
        bomb = gzip.compress(b" " * 50_000_000)
        for encoding in ("gzip", "deflate", "br", "gzip, identity"):
            packed = await service.ask(
                "POST", "/v1/generate", content=bomb[:60_000], headers=JSON | {"Content-Encoding": encoding}
            )
            assert (packed.status_code, packed.headers["accept-encoding"]) == (415, "identity")
        long = await service.ask("POST", "/v1/generate", json=SHORT, headers={f"X-{k}": "x" * 1000 for k in range(40)})
        assert long.status_code == 431
        assert len(service.denoiser.calls) == calls


@runs
async def test_a_page_of_another_origin_cannot_start_work() -> None:
    async with running() as service:
        calls = len(service.denoiser.calls)
        origin = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
        for simple in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            posted = await service.ask(
                "POST", "/v1/generate", content=json.dumps(SHORT), headers=origin | {"Content-Type": simple}
            )
            assert posted.status_code == 415
        preflight = await service.ask(
            "OPTIONS",
            "/v1/generate",
            headers=origin
            | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"},
        )
        assert preflight.status_code == 405
        rebound = await service.ask("POST", "/v1/generate", json=SHORT, headers={"Host": "evil.example:8000"})
        assert rebound.status_code == 421
        for answer in (posted, preflight, rebound, await service.ask("GET", "/v1/models", headers=origin)):
            assert not [name for name in answer.headers if name.startswith("access-control-")]
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert len(service.denoiser.calls) == calls


@runs
async def test_probes_may_use_any_address_and_reach_health_only() -> None:
    async with running() as service:
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert (await service.ask("GET", path, headers={"Host": "10.1.2.3:8000"})).status_code == 200
        for path in ("/metrics", "/v1/models", "/healthz/", "/"):
            assert (await service.ask("GET", path, headers={"Host": "10.1.2.3:8000"})).status_code == 421


@runs
async def test_every_get_route_answers_head() -> None:
    async with running() as service:
        routes = {path for path, operations in service.app.openapi()["paths"].items() if "get" in operations}
        paths = {path.replace("{model}", "m").replace("{version}", "exact") for path in routes}
        for path in (paths | {"/", "/docs", "/openapi.json", "/page/main.js"}) - {"/metrics"}:
            get, head = [await service.ask(method, path) for method in ("GET", "HEAD")]
            assert (head.status_code, head.content) == (get.status_code, b"")
            changing = {"x-request-id"}
            assert {n: v for n, v in head.headers.items() if n not in changing} == {
                n: v for n, v in get.headers.items() if n not in changing
            }
        assert (await service.ask("HEAD", "/metrics")).status_code == 200
        assert (await service.ask("HEAD", "/nowhere")).status_code == 404
        refused = await service.ask("HEAD", "/v1/generate")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        refused = await service.ask("POST", "/v1/models", json={})
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


@runs
async def test_every_answer_has_the_security_headers() -> None:
    async with running() as service:
        answers = [
            await service.ask("POST", "/v1/generate", json=SHORT),
            await service.ask("POST", "/v1/generate", json=SHORT, headers={"Accept": "image/png"}),
            await service.ask("POST", "/v1/generate", json={"n": 0}),
            await service.ask("GET", "/v1/models", headers={"Host": "evil.example"}),
            *[await service.ask("GET", path) for path in ("/v1/models", "/healthz", "/metrics", "/nowhere")],
        ]
        for answer in answers:
            assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
            assert "server" not in answer.headers
        docs = await service.ask("GET", "/docs")
        assert "frame-ancestors 'none'" in docs.headers["content-security-policy"]
        timing = answers[0].headers["server-timing"]
        assert [part.partition(";")[0] for part in timing.split(", ")] == ["queue", "denoise", "encode"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Keys]]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = Keys(folder, alice=Limits())
    environment = {"IDDPM_KEYS_FILE": str(keys.path), "IDDPM_READ_TIMEOUT_S": "3"}
    with running_process(tiny_checkpoint(folder / "tiny"), folder / "log.txt", environment=environment) as server:
        yield server, keys


def test_a_process_closes_slow_requests_and_answers_garbage_without_naming_the_server(
    keyed: tuple[Server, Keys],
) -> None:
    server, _ = keyed
    for sent, status in [(b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n", 408), (b"garbage\r\n\r\n", 400)]:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as client:
            client.sendall(sent)
            with client.makefile("rb") as stream:
                answer = stream.read()  # read to the end: the connection is closed
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"uvicorn" not in answer.lower()


def test_secrets_never_appear_in_logs_and_no_request_can_inject_log_lines(keyed: tuple[Server, Keys]) -> None:
    server, keys = keyed
    key, almost, elsewhere = keys.keys["alice"], keys.keys["alice"][:-1], new_key()
    url = f"{server.url}/v1/generate"
    forged = '{"level": "forged"}'
    with httpx.Client(timeout=PATIENCE_S) as client:
        body = {"steps": 2}
        named = client.post(url, json=body, headers={"Authorization": f"Bearer {key}", "X-Request-ID": "mine-42"})
        assert named.status_code == 200
        for headers in ({"Authorization": f"Bearer {almost}"}, {"Authorization": f"Basic {key}"}):
            assert client.post(url, json=body, headers=headers).status_code == 401
        authorized = {"Authorization": f"Bearer {key}"}
        client.get(f"{server.url}/v1/models?key={elsewhere}", headers=authorized)
        client.post(url, json={elsewhere: key, "model": elsewhere}, headers=authorized)
        client.post(url, json=body, headers=authorized | {"Idempotency-Key": elsewhere})
        client.post(url, json=body, headers=authorized | {"X-Request-ID": f"a\t{forged}", "User-Agent": elsewhere})
        client.get(f"{server.url}/%0a{forged}%0d%1b[31m", headers=authorized)
    lines = server.log.read_text().splitlines()
    for secret in (key, almost, elsewhere, hash_of(key)):
        assert not [line for line in lines if secret in line]
    records = [json.loads(line) for line in lines]
    assert not [record for record in records if record["level"] == "forged"]
    requests = [record for record in records if record["logger"] == "service.http.door.observe"]
    assert all(record["request_id"] for record in requests)
    (mine,) = [record for record in requests if record["request_id"] == "mine-42"]
    assert mine["event"].startswith("POST /v1/generate 200 ")
    assert mine["event"].endswith(" key:alice")
