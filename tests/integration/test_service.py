"""The service as clients see it: a real process, real sockets, a tiny random model."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from diffusion.noise import draw_class
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from tests.counts import LONG
from tests.fakes import CLASS_NAMES, tiny_checkpoint, tiny_config, tiny_network
from tests.integration.server import Server, running
from tests.waiting import PATIENCE_S, until

Uint8Array = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model, tmp_path_factory.mktemp("log") / "log.txt") as running_server:
        yield running_server


@cache
def reference(
    seed: int, index: int, class_index: int, steps: int, cfg_scale: float, sampler: str = "ancestral", eta: float = 0.0
) -> bytes:
    """Sample one image alone, without any service."""
    config = tiny_config()
    assert sampler in ("ancestral", "ddim")
    plan = build_plan(config.diffusion, "ddim" if sampler == "ddim" else "ancestral", str(steps), eta)
    spec = ImageSpec(seed=seed, image_index=index, class_index=class_index, cfg_scale=cfg_scale)
    return sample_images(tiny_network(config), plan, [spec])[0].tobytes()


def decode(b64: str) -> Uint8Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def problem_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == response.status_code
    return body


def test_a_request_gets_its_images_and_their_parameters(server: Server) -> None:
    response = server.generate(**{"class": "cat", "n": 2, "steps": 6, "seed": 11, "cfg_scale": 2.0})
    assert response.status_code == 200
    body = response.json()
    assert (body["model"], len(body["numerics_id"])) == ("tiny", 16)
    for index, image in enumerate(body["images"]):
        assert (image["class"], image["class_index"], image["seed"], image["image_index"], image["steps"]) == (
            "Cat", 2, 11, index, 6,
        )  # fmt: skip
        assert image["queue_ms"] >= 0
        assert image["compute_ms"] > 0
        assert decode(image["b64_json"]).tobytes() == reference(11, index, 2, 6, 2.0)


def test_defaults_are_the_models_guidance_a_random_seed_and_a_class_drawn_from_it(server: Server) -> None:
    first, second = (server.generate(steps=3).json()["images"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    drawn = draw_class(first["seed"], 0, len(CLASS_NAMES))
    assert first["class"] == CLASS_NAMES[drawn]
    assert decode(first["b64_json"]).tobytes() == reference(first["seed"], 0, drawn, 3, 1.5)


def test_image_k_of_a_seed_is_the_same_in_any_request(server: Server) -> None:
    together = server.generate(**{"class": [0, "Bee", 2], "steps": 4, "seed": 5}).json()["images"]
    alone = server.generate(**{"class": 2, "steps": 4, "seed": 5, "image_index": 2}).json()["images"]
    assert together[2]["b64_json"] == alone[0]["b64_json"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"respacing": "2,3", "seed": 1}, 5),
        ({"respacing": "ddim5", "sampler": "ddim", "eta": 0.5, "seed": 1}, 5),
        ({"steps": 5, "sampler": "ddim", "seed": 1}, 5),
    ],
)
def test_respacing_and_samplers(server: Server, fields: dict[str, Any], expected: int) -> None:
    response = server.generate(**{"class": 0, **fields})
    assert response.json()["images"][0]["steps"] == expected


def test_ddim_with_eta_gives_the_reference_pixels(server: Server) -> None:
    body = {"class": 1, "steps": 5, "sampler": "ddim", "eta": 0.5, "seed": 3, "cfg_scale": 1}
    image = server.generate(**body).json()["images"][0]
    assert decode(image["b64_json"]).tobytes() == reference(3, 0, 1, 5, 1.0, "ddim", 0.5)


@pytest.mark.parametrize(("accept", "opens_as"), [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/*", "PNG")])
def test_accept_selects_a_plain_image(server: Server, accept: str, opens_as: str) -> None:
    body = {"class": 0, "steps": 4, "seed": 9, "cfg_scale": 1}
    response = httpx.post(f"{server.url}/v1/generate", json=body, headers={"Accept": accept}, timeout=PATIENCE_S)
    assert response.headers["x-seed"] == "9"
    picture = Image.open(io.BytesIO(response.content))
    assert picture.format == opens_as
    assert np.asarray(picture.convert("L")).tobytes() == reference(9, 0, 0, 4, 1.0)


def test_several_images_come_as_a_grid(server: Server) -> None:
    response = httpx.post(
        f"{server.url}/v1/generate", json={"n": 4, "steps": 2}, headers={"Accept": "image/png"}, timeout=PATIENCE_S
    )
    assert Image.open(io.BytesIO(response.content)).size == (2 * 8 + 2, 2 * 8 + 2)


def test_npz_holds_images_and_labels_as_the_adm_evaluator_reads_them(server: Server) -> None:
    body = {"class": [3, 1], "steps": 4, "seed": 9, "cfg_scale": 1}
    response = httpx.post(
        f"{server.url}/v1/generate", json=body, headers={"Accept": "application/x-npz"}, timeout=PATIENCE_S
    )
    with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (2, 8, 8, 1)
        assert arrays["arr_0"][1].tobytes() == reference(9, 1, 1, 4, 1.0)
        assert arrays["arr_1"].tolist() == [3, 1]
    one = server.generate(**body, format="npz").json()["images"][0]
    with np.load(io.BytesIO(base64.b64decode(one["b64_json"])), allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (1, 8, 8, 1)


def test_a_zip_has_one_file_per_image_with_safe_names(server: Server) -> None:
    body = {"class": ["T-shirt/top", "T-shirt/top", 0], "steps": 4, "seed": 9, "cfg_scale": 1, "format": "webp"}
    response = httpx.post(
        f"{server.url}/v1/generate", json=body, headers={"Accept": "application/zip"}, timeout=PATIENCE_S
    )
    assert response.headers["content-disposition"] == 'attachment; filename="iddpm-9.zip"'
    with ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.namelist() == [
            "0000-T-shirt-top-seed9-0.webp", "0001-T-shirt-top-seed9-1.webp", "0002-Ape-seed9-2.webp",
        ]  # fmt: skip
        second = np.asarray(Image.open(io.BytesIO(archive.read("0001-T-shirt-top-seed9-1.webp"))))
    assert second[..., :1].tobytes() == reference(9, 1, 3, 4, 1.0)


def test_jpeg_is_returned_on_request(server: Server) -> None:
    body = {"class": 1, "steps": 4, "seed": 9, "cfg_scale": 1}
    response = httpx.post(
        f"{server.url}/v1/generate", json={**body, "quality": 95}, headers={"Accept": "image/jpeg"}, timeout=PATIENCE_S
    )
    assert response.headers["content-type"] == "image/jpeg"
    raw = Image.open(io.BytesIO(response.content))
    assert (raw.format, raw.size) == ("JPEG", (8, 8))
    image = server.generate(**body, format="jpeg", quality=95).json()["images"][0]
    assert base64.b64decode(image["b64_json"]) == response.content


def test_a_stream_over_a_socket_ends_with_the_pixels_and_a_disconnect_frees_its_rows(server: Server) -> None:
    body = {"class": 2, "steps": 40, "seed": 11, "cfg_scale": 1, "stream": True, "preview_every": 10}
    before = server.metrics()
    with httpx.stream("POST", f"{server.url}/v1/generate", json=body, timeout=PATIENCE_S) as response:
        lines = list(response.iter_lines())
    assert response.headers["transfer-encoding"] == "chunked"
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert (events[0], events[-1]) == ("queued", "completed")
    last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
    assert decode(last["images"][0]["b64_json"]).tobytes() == reference(11, 0, 2, 40, 1.0)

    with httpx.stream(
        "POST", f"{server.url}/v1/generate", json={**body, "n": 32, "steps": 1000}, timeout=PATIENCE_S
    ) as response:
        next(response.iter_lines())
    wait_for(server, lambda now: now["iddpm_images_running"] == now["iddpm_images_waiting"] == 0)
    after = server.metrics()
    assert after["iddpm_requests_total cancelled"] - before["iddpm_requests_total cancelled"] == 1
    assert after["iddpm_requests_total ok"] - before["iddpm_requests_total ok"] == 1
    assert after["iddpm_event_loop_lag_seconds_count"] > 0
    assert "Traceback" not in server.log.read_text()


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"class": "Dog"}, "class", 'must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'),
    ({"class": 4}, "class", "index must be 0..3; got 4"),
    ({"class": "3"}, "class", 'no class has the name "3"; an index is a number without quotes'),
    ({"class": -1}, "class", "its index (an integer, 0 or more), or a list of 1 to 64 of these; got -1"),
    ({"class": 1.5}, "class", "must be the name of a class (1 to 200 characters)"),
    ({"class": []}, "class", "a list of 1 to 64 of these; got []"),
    ({"class": ["Ape", None]}, "class", "must be the name of a class"),
    ({"class": ["Ape"], "n": 2}, "n", "must be 1, the length of the list in `class`"),
    ({"n": 0}, "n", "greater than or equal to 1; got 0"),
    ({"n": 65}, "n", "less than or equal to 64; got 65"),
    ({"n": True}, "n", "valid integer"),
    ({"n": "2"}, "n", "valid integer"),
    ({"steps": 1}, "steps", "greater than or equal to 2; got 1"),
    ({"steps": 1001}, "steps", "must be 2..1000"),
    ({"steps": 50, "respacing": "50"}, "respacing", "not both"),
    ({"respacing": "ddim999"}, "respacing", "ddim999"),
    ({"respacing": "600,600"}, "respacing", "section 1 of 2, which has only 500"),
    ({"respacing": "x"}, "respacing", "number of steps"),
    ({"respacing": "1"}, "respacing", "at least 2"),
    ({"sampler": "euler"}, "sampler", 'must be "ancestral", "ddim", "dpm++" or "sde-dpm++"; got "euler"'),
    ({"eta": 0.5}, "eta", 'only with sampler "ddim"; sampler is "ancestral"'),
    ({"sampler": "ddim", "eta": 1.5}, "eta", "less than or equal to 1"),
    ({"cfg_scale": -1}, "cfg_scale", "greater than or equal to 0"),
    ({"cfg_scale": 21}, "cfg_scale", "less than or equal to 20"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**53}, "seed", "9007199254740991"),
    ({"format": "gif"}, "format", '"png", "webp", "jpeg", "npz" or "npy"'),
    ({"quality": 90}, "quality", 'only with format "jpeg"; format is "png"'),
    ({"format": "jpeg", "quality": 0}, "quality", "greater than or equal to 1; got 0"),
    ({"format": "jpeg", "compression": 5}, "compression", 'not valid with format "jpeg"'),
    ({"compression": 10}, "compression", "less than or equal to 9; got 10"),
    ({"preview_every": 5}, "preview_every", "only with `stream`, which is false"),
    ({"stream": True, "preview_every": 0}, "preview_every", "greater than or equal to 1; got 0"),
    ({"stepz": 50}, "stepz", "unknown field; allowed: model, steps, respacing"),
    ({"n": 64, "steps": 1000, "cfg_scale": 2}, "steps", "at most 64000 per request"),
]


@pytest.mark.parametrize(("fields", "field", "message"), BAD_FIELDS)
def test_invalid_fields_are_named_with_the_rule(
    server: Server, fields: dict[str, Any], field: str, message: str
) -> None:
    response = server.generate(**fields)
    assert response.status_code == 422
    errors = problem_of(response)["errors"]
    (error,) = errors
    assert error["field"] == field
    assert message in error["message"]


def raw(server: Server, content: bytes, **headers: str) -> httpx.Response:
    given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return httpx.post(f"{server.url}/v1/generate", content=content, headers=given, timeout=PATIENCE_S)


def test_requests_that_fail_before_their_fields_are_read(server: Server) -> None:
    assert problem_of(raw(server, b"{not json"))["title"] == "Malformed JSON"
    assert raw(server, b"{}", Content_Type="text/plain").status_code == 415
    assert raw(server, b" " * 9_000_000).status_code == 413
    assert raw(server, b"{}", Host="evil.example").status_code == 421
    assert problem_of(server.generate(model="nope"))["detail"] == 'model: must be one of tiny; got "nope"'
    assert problem_of(server.get("/nowhere"))["status"] == 404
    assert problem_of(server.get("/v1/generate"))["status"] == 405


def test_reading_stops_at_the_limit_for_a_body_without_a_declared_length(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    response = httpx.post(
        f"{server.url}/v1/generate",
        content=endless(),
        headers={"Content-Type": "application/json"},
        timeout=PATIENCE_S,
    )
    assert response.status_code == 413


def test_a_valid_request_id_is_returned_and_an_invalid_one_is_replaced(server: Server) -> None:
    assert raw(server, b"{", X_Request_ID="mine-1").headers["x-request-id"] == "mine-1"
    assert raw(server, b"{", X_Request_ID="a b").headers["x-request-id"] != "a b"
    response = raw(server, b"{")
    assert response.headers["x-request-id"] in problem_of(response)["instance"]
    assert "server" not in response.headers


def test_models_health_and_docs(server: Server) -> None:
    (info,) = server.get("/v1/models").json()["models"]
    assert info["classes"] == list(CLASS_NAMES)
    assert (info["num_timesteps"], info["guidance"], info["default_cfg_scale"]) == (1000, True, 1.5)
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}
    assert server.get("/docs").status_code == 200
    assert "/v1/generate" in server.get("/openapi.json").json()["paths"]


def test_sixteen_clients_with_mixed_requests_get_their_pixels_and_the_metrics_agree(server: Server) -> None:
    before = server.metrics()
    rng = np.random.default_rng(0)
    bodies: list[dict[str, Any]] = [
        {
            "class": int(rng.integers(4)),
            "steps": int(rng.choice([50, 100, 250] if LONG else [10, 20, 50])),
            "seed": int(rng.integers(2**53)),
            "cfg_scale": float(rng.choice([1.0, 1.5])),
            "n": 2 if k == 0 else 1,
        }
        for k in range(16)
    ] + [{"n": 0}, {"class": "Dog"}]
    with ThreadPoolExecutor(len(bodies)) as pool:
        responses = list(pool.map(lambda body: server.generate(**body), bodies))

    images = row_steps = 0
    for body, response in zip(bodies[:16], responses, strict=False):
        assert response.status_code == 200
        for index, image in enumerate(response.json()["images"]):
            key = (body["seed"], index, body["class"], body["steps"], body["cfg_scale"])
            assert decode(image["b64_json"]).tobytes() == reference(*key)
            images += 1
            row_steps += int(body["steps"]) * (1 if body["cfg_scale"] == 1.0 else 2)
    assert [response.status_code for response in responses[16:]] == [422, 422]

    counted = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
    assert counted["iddpm_requests_total ok"] == counted["iddpm_request_duration_seconds_count"] == 16
    assert counted["iddpm_encode_seconds_count"] == 16
    assert counted["iddpm_requests_total invalid"] == 2
    assert counted["iddpm_requests_total failed"] == counted["iddpm_requests_total rejected"] == 0
    assert counted["iddpm_images_total"] == counted["iddpm_image_queue_seconds_count"] == images
    assert counted["iddpm_row_steps_total"] == counted["iddpm_rows_per_network_call_sum"] == row_steps
    steps = sum(n for name, n in counted.items() if name.startswith("iddpm_engine_step_seconds_count"))
    assert counted["iddpm_network_calls_total tiny"] == steps
    assert counted["iddpm_network_calls_total tiny"] < row_steps / 2  # the requests did share network calls
    after = server.metrics()
    assert after["iddpm_images_waiting"] == after["iddpm_images_running"] == 0


def test_a_client_that_disconnects_frees_its_rows(server: Server) -> None:
    before = server.metrics()
    body = b'{"n": 32, "steps": 1000, "cfg_scale": 1}'
    head = f"POST /v1/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(server, lambda now: now["iddpm_images_running"] > 0)
    wait_for(server, lambda now: now["iddpm_images_running"] == now["iddpm_images_waiting"] == 0)
    after = server.metrics()
    assert after["iddpm_requests_total cancelled"] - before["iddpm_requests_total cancelled"] == 1
    assert after["iddpm_row_steps_total"] - before["iddpm_row_steps_total"] < 32 * 1000
    assert "never retrieved" not in server.log.read_text()


def wait_for(server: Server, condition: Any) -> None:
    until(lambda: condition(server.metrics()))


def test_a_full_queue_refuses_with_retry_after(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log", environment={"IDDPM_MAX_QUEUE": "2", "IDDPM_MAX_ROWS": "2"}) as small:
        with ThreadPoolExecutor(8) as pool:
            filling = [pool.submit(small.generate, steps=300, cfg_scale=1, seed=k) for k in range(4)]
            wait_for(small, lambda now: now["iddpm_images_running"] + now["iddpm_images_waiting"] == 4)
            late = [pool.submit(small.generate, steps=100, cfg_scale=1, seed=k) for k in range(4, 8)]
            responses = [asked.result() for asked in filling + late]
        refused = [response for response in responses if response.status_code == 503]
        assert 1 <= len(refused) <= 4
        for response in refused:
            assert problem_of(response)["title"] == "Queue full"
            assert int(response.headers["retry-after"]) >= 1
        counted = small.metrics()
        assert counted["iddpm_requests_total rejected"] == len(refused)
        assert counted["iddpm_requests_total ok"] == 8 - len(refused)


def test_a_second_signal_stops_at_once_with_requests_in_flight(model: Path, tmp_path: Path) -> None:
    head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(model, tmp_path / "log") as leaving, socket.create_connection(("127.0.0.1", leaving.port)) as client:
        client.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(leaving.generate, steps=1000, n=32, cfg_scale=1)
            wait_for(leaving, lambda now: now["iddpm_images_running"] > 0)
            leaving.terminate()
            until(lambda: leaving.get("/readyz").status_code != 200)
            leaving.terminate()
            assert leaving.wait() == 1
            assert isinstance(lost.exception(), httpx.TransportError)


def test_sigterm_finishes_accepted_requests_refuses_new_ones_and_exits_with_0(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log") as leaving, ThreadPoolExecutor(6) as pool:
        accepted = [pool.submit(leaving.generate, steps=150, n=2, cfg_scale=1, seed=k) for k in range(6)]
        wait_for(leaving, lambda now: now["iddpm_images_running"] + now["iddpm_images_waiting"] == 12)
        leaving.terminate()
        until(lambda: leaving.get("/readyz").status_code != 200)
        ready, late = leaving.get("/readyz"), leaving.generate(steps=2)
        assert (ready.status_code, late.status_code) == (503, 503)
        assert "retry-after" in late.headers
        assert leaving.get("/healthz").status_code == 200
        assert [future.result().status_code for future in accepted] == [200] * 6
        assert leaving.wait() == 0
    log = (tmp_path / "log").read_text()
    assert "finishing accepted requests" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--port", "70000"], {}, "port: Input should be less than or equal to 65535"),
        (["--backend", "tpu"], {}, "backend: Input should be 'auto', 'openvino', 'onnxruntime', 'torch' or 'tensorrt'"),
        (["--model", "/nonexistent"], {}, "/nonexistent: there is no such folder"),
        ([], {"IDDPM_MAX_ROW": "4"}, "unknown environment variable IDDPM_MAX_ROW; settings are IDDPM_ADMIN_ROOT"),
    ],
)
def test_invalid_flags_end_start_up_with_one_line(
    model: Path, tmp_path: Path, flags: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(RuntimeError) as error, running(model, tmp_path / "log", *flags, environment=environment):
        pass
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)
