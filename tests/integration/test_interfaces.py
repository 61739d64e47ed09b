"""What all interfaces have in common: the form of errors, JSON bodies, null, Accept, and relative addresses."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from service.http.door.json_body import read_json
from service.http.encoding_pool import LARGE_BODY
from service.http.interfaces import Interface, generates
from service.http.kserve.schemas import InferRequest
from service.http.openai.schemas import EditRequest, ImagesRequest
from service.http.routes import RouteTable
from service.requests.generate_request import GenerateRequest
from tests.integration.exact_service import exact_app
from tests.integration.in_process import Service, running
from tests.waiting import runs

JSON = {"Content-Type": "application/json"}
STEPS = {"name": "steps", "shape": [1], "datatype": "INT64", "data": [2]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"steps": 2, "class": 0},
    "/v1/images/generations": {"steps": 2, "prompt": "0"},
    "/v2/models/m/infer": {"inputs": [STEPS]},
}


def interface_of(answer: httpx.Response) -> Interface:
    """Return the interface whose form this error has."""
    body = answer.json()
    if answer.headers["content-type"] == "application/problem+json":
        assert {"type", "title", "status", "detail"} <= set(body)
        return Interface.NATIVE_AND_OPENAI if "error" in body else Interface.NATIVE
    assert set(body) == {"error"}
    if isinstance(body["error"], str):
        return Interface.KSERVE
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return Interface.OPENAI


def message_of(answer: httpx.Response) -> str:
    body = answer.json()
    if interface_of(answer) is Interface.NATIVE_AND_OPENAI:
        assert body["detail"] == body["error"]["message"]
    found = body["detail"] if "detail" in body else body["error"]
    return str(found["message"] if isinstance(found, dict) else found)


def test_every_route_gets_its_interface_from_its_router() -> None:
    table = RouteTable(exact_app().routes)
    expected = {
        "/v1/generate": Interface.NATIVE,
        "/v1/models": Interface.NATIVE_AND_OPENAI,
        "/v1/models/m": Interface.OPENAI,
        "/v1/models/m/thumbnails/1": Interface.NATIVE,
        "/v1/images/generations": Interface.OPENAI,
        "/v1/images/edits": Interface.OPENAI,
        "/v2": Interface.KSERVE,
        "/v2/health/live": Interface.KSERVE,
        "/v2/models/stats": Interface.KSERVE,
        "/v2/models/m/infer": Interface.KSERVE,
        "/v2/models/m/versions/1/stats": Interface.KSERVE,
        "/healthz": Interface.NATIVE,
        "/metrics": Interface.NATIVE,
        "/": Interface.NATIVE,
    }
    for path, interface in expected.items():
        assert table.interface_of(path) is interface, path
    for path in (*BODIES, "/v1/images/edits"):
        assert generates("POST", path)


ERRORS = [
    ("GET", "/v1/models/m/thumbnails/1", 403, Interface.NATIVE, "X-Requested-With"),
    ("GET", "/v1/models/other", 404, Interface.OPENAI, 'model: must be one of m; got "other"'),
    ("POST", "/v1/models", 405, Interface.NATIVE_AND_OPENAI, "POST /v1/models: this route takes GET"),
    ("GET", "/v2/models/other", 404, Interface.KSERVE, 'got "other"'),
    # no such route: the message has the requested path and the routes that exist
    ("POST", "/v1/chat/completions", 404, Interface.OPENAI, "no POST /v1/chat/completions here; images come from POST"),
    ("POST", "/v1/images/variations", 404, Interface.OPENAI, "base_url of OpenAI's clients is the service's address"),
    ("GET", "/v1", 404, Interface.OPENAI, "no GET /v1 here"),
    ("GET", "/v2/nowhere", 404, Interface.KSERVE, "no GET /v2/nowhere here; images come from"),
    ("POST", "/v2/models/m/generate", 404, Interface.KSERVE, "no POST /v2/models/m/generate here; images come from"),
    ("POST", "/chat/completions", 404, Interface.NATIVE_AND_OPENAI, "base_url of OpenAI's clients is the service"),
    ("GET", "/page/nothing.js", 404, Interface.NATIVE_AND_OPENAI, "no GET /page/nothing.js here"),
    # an existing route with a similar path was meant
    ("POST", "/images/generations", 404, Interface.OPENAI, "there is POST /v1/images/generations; base_url of OpenAI"),
    ("POST", "/v1/v1/images/generations", 404, Interface.OPENAI, "there is POST /v1/images/generations; base_url"),
    ("GET", "/models", 404, Interface.NATIVE_AND_OPENAI, "there is GET /v1/models; base_url"),
    ("POST", "/iddpm/v1/generate", 404, Interface.NATIVE, "no POST /iddpm/v1/generate here, but there is POST /v1/gen"),
    ("POST", "/v1/generate/", 404, Interface.NATIVE, "no POST /v1/generate/ here, but there is POST /v1/generate"),
    ("GET", "/v1/models/", 404, Interface.NATIVE_AND_OPENAI, "but there is GET /v1/models"),
    ("GET", "/v1/models/m/", 404, Interface.OPENAI, "but there is GET /v1/models/m"),
    ("GET", "/v2/", 404, Interface.KSERVE, "but there is GET /v2"),
    ("GET", "/v2/models/m/ready/", 404, Interface.KSERVE, "but there is GET /v2/models/m/ready"),
    ("GET", "/docs/", 404, Interface.NATIVE, "but there is GET /docs"),
    ("GET", "/v1//models", 404, Interface.NATIVE_AND_OPENAI, "no GET /v1//models here, but there is GET /v1/models"),
    # a path may contain anything, and the message has no line breaks
    ("GET", "/healthz%0a", 400, Interface.NATIVE, "the path must not end with a line break"),
    ("GET", "/%0a%1b[31m%e2%80%ae", 404, Interface.NATIVE_AND_OPENAI, r'no GET "/\n\u001b[31m\u202e" here'),
    ("GET", "/v1/" + "x" * 5000, 404, Interface.OPENAI, "no GET /v1/xxx"),
    ("GET", "/v1" + "/x" * 2000, 404, Interface.OPENAI, "no GET /v1/x/x/x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> list[httpx.Response]:
    answers: list[httpx.Response] = []

    @runs
    async def ask() -> None:
        async with running() as service:
            for method, path, *_ in ERRORS:
                answers.append(await service.ask(method, path, follow_redirects=False))

    ask()
    return answers


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=[f"{method} {path[:40]}" for method, path, *_ in ERRORS])
def test_an_error_has_the_form_of_its_interface(errors: list[httpx.Response], number: int) -> None:
    *_, status, interface, message = ERRORS[number]
    answer = errors[number]
    assert (answer.status_code, interface_of(answer)) == (status, interface)
    assert message in message_of(answer)
    assert len(answer.content) < 1500
    assert "location" not in answer.headers  # a redirect would name the scheme and the host that a proxy has changed
    if interface in (Interface.OPENAI, Interface.NATIVE_AND_OPENAI):
        assert answer.headers["x-should-retry"] == "false"


async def post(service: Service, path: str, content: bytes, **headers: str) -> httpx.Response:
    return await service.ask("POST", path, content=content, headers=JSON | headers)


@runs
async def test_all_interfaces_read_the_same_bytes_as_json() -> None:
    async with running() as service:
        for path, body in BODIES.items():
            text = json.dumps(body)
            assert (await post(service, path, text.encode("utf-8-sig"))).status_code == 200
            refused = {
                "not UTF-8": [text.encode("utf-16"), text.encode("utf-32"), b'{"a": "\xff"}'],
                "Expecting": [b"{", text.encode("utf-16-le"), text.encode("utf-16-be")],
                "in line 2, column 8": [b'{\n   "a" 1}'],
                "nested too deeply": [b'{"a":' * 1900],
                "a number is too long": [b'{"a":' + b"1" * 10_000 + b"}"],
            }
            for reason, contents in refused.items():
                for content in contents:
                    answer = await post(service, path, content)
                    assert answer.status_code == 400, (path, content[:20])
                    assert message_of(answer).startswith("the body is not valid JSON: ")
                    assert reason in message_of(answer), (path, content[:20])
        head = json.dumps(BODIES["/v2/models/m/infer"]).encode("utf-8-sig")
        framed = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        assert (await post(service, "/v2/models/m/infer", head, **framed)).status_code == 200


@runs
async def test_large_bodies_are_read_in_the_pool_with_the_errors_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def noted(text: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return read_json(text)

    monkeypatch.setattr("service.http.door.json_body.read_json", noted)
    monkeypatch.setattr("service.http.kserve.routes.read_json", noted)
    async with running() as service:
        for path in ("/v1/generate", "/v1/encode", "/v1/denoise", "/v2/models/m/infer"):
            # Malformed JSON comes before broken rules, of which unknown fields come with all others
            for body, status in ((b'{"a" 1}', 400), (b"null", 422), (b'{"steps": 1, "more": 2}', 422)):
                small = await post(service, path, body)
                large = await post(service, path, body + b" " * LARGE_BODY)
                assert small.status_code == large.status_code == (400 if path.startswith("/v2") else status)
                assert message_of(small) == message_of(large)
                inline, in_pool = threads[-2:]
                assert (inline.startswith("encode"), in_pool.startswith("encode")) == (False, True)
        assert len(threads) == 24
        large_body = json.dumps(BODIES["/v1/generate"]).encode() + b" " * LARGE_BODY
        assert (await post(service, "/v1/generate", large_body)).status_code == 200


@pytest.mark.parametrize("body", [GenerateRequest, ImagesRequest, EditRequest, InferRequest])
def test_null_means_absent_in_every_optional_field_and_in_the_document(body: type[BaseModel]) -> None:
    def check(model: type[BaseModel], schema: dict[str, Any]) -> None:
        for name, field in model.model_fields.items():
            said = schema["properties"][field.alias or name]
            assert field.is_required() == ((field.alias or name) in schema.get("required", ()))
            assert ({"type": "null"} in said.get("anyOf", ())) != field.is_required(), name

    schema = body.model_json_schema()
    check(body, schema)
    required: dict[str, Any] = {"inputs": []} if body is InferRequest else {"image": b""} if body is EditRequest else {}
    nulls = {field.alias or name: None for name, field in body.model_fields.items() if not field.is_required()}
    assert body.model_validate(required | nulls) == body.model_validate(required)
    assert body.model_validate(required | nulls).model_fields_set == set(required)
    if body is InferRequest:
        objects = {"InputTensor": "inputs", "RequestedOutput": "outputs", "InferParameters": "parameters"}
        assert set(schema["$defs"]) == {*objects, "InputParameters", "RequestedOutputParameters"}
        for definition in schema["$defs"].values():
            for name, field in definition["properties"].items():
                is_required = name in definition.get("required", ())
                assert ({"type": "null"} in field.get("anyOf", ())) != is_required


@runs
async def test_null_means_absent_in_optional_fields_only() -> None:
    async with running() as service:
        nulls = dict.fromkeys(["format", "stream", "sampler", "priority", "image_index", "quality", "class", "model"])
        native = await service.ask("POST", "/v1/generate", json={"steps": 2, **nulls})
        assert (native.status_code, native.headers["content-type"]) == (200, "application/json")
        openai = dict.fromkeys(["prompt", "sampler", "image_index", "priority", "style", "n", "stream"])
        answer = await service.ask("POST", "/v1/images/generations", json={"steps": 2, **openai})
        assert answer.status_code == 200
        output = {"name": "seed", "parameters": {"binary_data": None}}
        infer = {
            "id": None,
            "parameters": dict.fromkeys(["priority", "timeout", "binary_data_output"]),
            "inputs": [STEPS | {"parameters": None}],
            "outputs": [output, {"name": "images", "parameters": None}],
        }
        answer = await service.ask("POST", "/v2/models/m/infer", json=infer)
        assert [output["name"] for output in answer.json()["outputs"]] == ["seed", "images"]
        for path, body, message in [
            ("/v1/generate", {"stepz": None}, "stepz: unknown field; allowed: model, steps, "),
            ("/v1/generate", {"class": ["Ape", None]}, 'got ["Ape", null]'),
            ("/v1/images/generations", {"stepz": None}, "stepz: unknown field; allowed: model, steps, "),
            ("/v2/models/m/infer", {"inputs": None}, "inputs: must be a list; got null"),
            ("/v2/models/m/infer", {"inputs": [{**STEPS, "name": None}]}, "inputs.0.name: input should be a valid str"),
        ]:
            refused = await service.ask("POST", path, json=body)
            assert refused.status_code in (400, 422)
            assert message in message_of(refused)


MESSAGES: list[tuple[str, dict[str, Any] | list[Any], str]] = [
    ("/v1/generate", {"stream": "yes"}, 'stream: must be true or false; got "yes"'),
    ("/v1/generate", {"n": True}, "n: input should be a valid integer; got true"),
    ("/v1/generate", {"cfg_scale": "x"}, 'cfg_scale: input should be a valid number; got "x"'),
    ("/v1/generate", {"format": "gif"}, 'format: must be "png", "webp", "jpeg", "npz" or "npy"; got "gif"'),
    ("/v1/generate", {"model": {"a": None}}, 'model: input should be a valid string; got {"a": null}'),
    ("/v1/generate", {"respacing": "it's"}, '"ddimN" or ""; got "it\'s"'),
    ("/v1/generate", {"respacing": "1"}, 'at least 2 steps; "1" keeps 1'),
    ("/v1/generate", [], "body: must be a JSON object; got []"),
    ("/v1/generate", dict.fromkeys(map(str, range(101)), 0), "body: must have at most 100 fields; got 101"),
    ("/v1/images/generations", {"size": "1024x1024"}, 'size: must be 8x8 or auto; got "1024x1024"'),
    ("/v1/images/generations", {"prompt": ["Ape"]}, 'prompt: input should be a valid string; got ["Ape"]'),
    ("/v2/models/m/infer", {"inputs": [], "outputs": [{"name": 1}]}, '"seed", "image_index" or "class_index"; got 1'),
    ("/v2/models/m/infer", {"inputs": [], "parameters": {"sequence_id": 1}},
     "parameters.sequence_id: unknown field; allowed: binary_data_output, priority, timeout"),
    ("/v2/models/m/infer", {"inputs": [], "parameters": {"timeout": 10**400}},
     "parameters.timeout: input should be less than or equal to 86400000000; got 1000"),
    ("/v2/models/m/infer", {"inputs": [{**STEPS, "datatype": "INT32"}]}, 'datatype must be INT64; got "INT32"'),
    ("/v2/models/m/infer", {"inputs": [dict.fromkeys(map(str, range(101)), 0)]},
     "inputs.0: must have at most 100 fields; got 101"),
    ("/v2/models/m/infer", {"inputs": [{**STEPS, "shape": "1"}]}, 'inputs.0.shape: must be a list; got "1"'),
]  # fmt: skip


@runs
async def test_messages_show_values_as_json() -> None:
    async with running() as service:
        for path, body, message in MESSAGES:
            answer = await service.ask("POST", path, json=body)
            assert answer.status_code in (400, 422)
            assert message in message_of(answer), body
            assert "None" not in message_of(answer)


@runs
async def test_accept_lines_are_joined_and_an_accept_that_excludes_all_types_is_refused() -> None:
    async with running() as service:
        lines = [("Accept", "image/png;q=0.1"), ("Accept", "application/json"), ("Content-Type", "application/json")]
        answer = await service.ask("POST", "/v1/generate", content=b'{"steps": 2}', headers=lines)
        assert answer.headers["content-type"] == "application/json"
        refused = await service.ask("POST", "/v1/generate", json={"steps": 2}, headers={"Accept": "text/html"})
        assert (refused.status_code, refused.json()["title"]) == (406, "Not acceptable")
        assert message_of(refused).startswith("Accept: must allow application/json, image/png, ")
        assert message_of(refused).endswith('; got "text/html"')
        events = {"steps": 2, "stream": True}  # a stream is requested in the body
        stream = await service.ask("POST", "/v1/generate", json=events, headers={"Accept": "text/html"})
        assert stream.headers["content-type"].startswith("text/event-stream")
        for path in ("/v1/images/generations", "/v2/models/m/infer"):  # routes with one media type
            assert (await service.ask("POST", path, json=BODIES[path], headers={"Accept": "image/png"})).json()


@runs
async def test_pages_contain_no_absolute_address() -> None:
    async with running() as service:
        docs = (await service.ask("GET", "/docs")).text
        assert "url: 'openapi.json'" in docs
        assert "'/openapi.json'" not in docs
        document = (await service.ask("GET", "/openapi.json")).json()
        assert [server["url"] for server in document["servers"]] == ["."]


@pytest.mark.parametrize(
    ("path", "body", "encodings"),
    [
        ("/v1/generate", {"n": 2}, 1),
        ("/v1/generate", {"n": 2, "stream": True}, 1),
        ("/v1/images/generations", {"n": 2, "prompt": "0"}, 1),
        ("/v1/images/generations", {"n": 2, "prompt": "0", "stream": True}, 2),
        ("/v2/models/m/infer", BODIES["/v2/models/m/infer"], 1),
        ("/v1/generate", {"n": 0}, 0),
    ],
)
@runs
async def test_the_encoding_of_answers_is_measured(path: str, body: dict[str, Any], encodings: int) -> None:
    async with running() as service:
        steps = {} if "inputs" in body else {"steps": 2}
        answer = await service.ask("POST", path, json=body | steps)
        assert answer.status_code == (200 if encodings else 422)
        assert await service.metric("iddpm_encode_seconds_count") == encodings
        assert (await service.metric("iddpm_encode_seconds_sum") > 0) == (encodings > 0)
