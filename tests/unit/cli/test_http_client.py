"""The Python client, synchronous and asynchronous: its requests, its retries, and its errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from cli import client as client_module
from cli import client_core
from cli.client import (
    AsyncClient,
    Client,
    ConnectionLost,
    DenoiseFields,
    EncodeFields,
    Event,
    GenerateFields,
    GenerateResponse,
    ProgressEvent,
    RequestFailed,
    UnexpectedAnswer,
    pixels_of,
)
from formats.images import encode
from service.encoding import encode_npy, encode_npz
from service.requests.array_requests import DenoiseRequest, EncodeRequest
from service.requests.generate_request import GenerateRequest

ANSWER: dict[str, Any] = {
    "model": "m",
    "images": [],
    "numerics_id": "0123456789abcdef",
    "timing": {"images_ahead": 0, "predicted_wait_s": 0, "wait_s": 0, "predicted_finish_s": 0, "finish_s": 0},
}
Outcome = httpx.Response | Exception
Ask = Callable[..., GenerateResponse]


class Pauses(list[float]):
    """The time that a client has waited, without waiting."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    taken = Pauses()

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(client_module, "time", SimpleNamespace(sleep=taken.append))
    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(sleep=sleep))
    return taken


class Service:
    """Answers with one outcome after the other, and repeats the last one."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes = list(outcomes)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome.stream, httpx.ByteStream):  # a response can be sent only once
            return httpx.Response(outcome.status_code, headers=outcome.headers, content=outcome.content)
        return outcome


def ask_sync(service: Service, *, key: str | None = None, patience_s: float = 60, **call: Any) -> GenerateResponse:
    transport = httpx.MockTransport(service)
    with Client("http://service", key=key, patience_s=patience_s, transport=transport) as client:
        return client.generate(**call)


def ask_async(service: Service, *, key: str | None = None, patience_s: float = 60, **call: Any) -> GenerateResponse:
    async def ask() -> GenerateResponse:
        transport = httpx.MockTransport(service)
        async with AsyncClient("http://service", key=key, patience_s=patience_s, transport=transport) as client:
            return await client.generate(**call)

    return asyncio.run(ask())


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


def good() -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


def refused(status: int, retry_after: str | None = None) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    problem = {"type": "urn:iddpm:x", "title": "Refused", "status": status, "detail": f"because of {status}"}
    return httpx.Response(status, json=problem, headers=headers)


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in parts, and may break off."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def event(name: str, **data: Any) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))


QUEUED = event("queued", images_ahead=2, predicted_wait_s=1, eta_s=2)
PROGRESS = event("progress", position=0, step=3, steps=9, eta_s=1)


def test_fields_are_those_of_a_request_except_stream() -> None:
    def named(body: type[BaseModel]) -> set[str]:
        return set(body.model_fields)

    assert set(GenerateFields.__annotations__) == named(GenerateRequest) - {"stream"}
    assert set(EncodeFields.__annotations__) == named(EncodeRequest) - {"format"}
    assert set(DenoiseFields.__annotations__) == named(DenoiseRequest)


def test_given_images_are_sent_in_base64_and_arrays_as_npy(ask: Ask) -> None:
    service, array = Service(good()), np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    ask(service, image=array, mask=b"\x89PNG", latent="YQ==", strength=0.5)
    body = json.loads(service.asked[0].content)
    assert base64.b64decode(body["mask"]) == b"\x89PNG"
    assert (body["latent"], body["strength"]) == ("YQ==", 0.5)
    assert np.array_equal(pixels_of(body["image"]), array)
    file = io.BytesIO()
    np.savez(file, array[None])
    assert np.array_equal(pixels_of(base64.b64encode(file.getvalue()).decode()), array)


def test_a_request_has_its_fields_the_api_key_and_its_own_idempotency_key(ask: Ask) -> None:
    service = Service(good())
    for given in ({}, {}, {"idempotency_key": "mine"}):
        assert ask(service, key="iddpm_x", class_=["Bee", 2], steps=5, **given).numerics_id == "0123456789abcdef"
    for request in service.asked:
        assert (request.method, str(request.url)) == ("POST", "http://service/v1/generate")
        assert json.loads(request.content) == {"class": ["Bee", 2], "steps": 5, "stream": False}
        assert request.headers["authorization"] == "Bearer iddpm_x"
    keys = [request.headers["idempotency-key"] for request in service.asked]
    assert keys[2] == "mine"
    assert len(set(keys)) == 3


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "failing", [refused(503), refused(429), httpx.ConnectError("refused"), httpx.ConnectTimeout("")], ids=repr
)
def test_a_request_that_was_not_executed_is_retried(ask: Ask, pauses: Pauses, failing: Outcome, streamed: bool) -> None:
    completed = httpx.Response(200, content=event("completed", **ANSWER)) if streamed else good()
    service = Service(failing, failing, completed)
    assert ask(service, n=3, on_event=(lambda _: None) if streamed else None).model == "m"
    assert len(service.asked) == 3
    assert len({request.content for request in service.asked}) == 1
    assert len({request.headers.get("idempotency-key") for request in service.asked}) == 1
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1


def test_it_never_retries_before_retry_after(ask: Ask, pauses: Pauses) -> None:
    ask(Service(refused(503, "7"), refused(429, "20"), good()))
    assert 7 < pauses[0] <= 7.5
    assert 20 < pauses[1] <= 21


def test_it_gives_up_at_once_if_retry_after_exceeds_its_patience(ask: Ask, pauses: Pauses) -> None:
    service = Service(refused(503, "61"))
    with pytest.raises(RequestFailed, match="Refused: because of 503") as raised:
        ask(service)
    assert raised.value.problem.status == 503
    assert (len(service.asked), pauses) == (1, [])


@pytest.mark.parametrize("retry_after", [None, "0", "Wed, 21 Oct 2026 07:28:00 GMT", "-1"])
def test_retries_end_for_any_retry_after(ask: Ask, pauses: Pauses, retry_after: str | None) -> None:
    service = Service(refused(429, retry_after))
    with pytest.raises(RequestFailed):
        ask(service, patience_s=30)
    assert 4 <= len(service.asked) <= 12
    assert sum(pauses) <= 30
    assert max(pauses) <= 8


def test_without_patience_there_are_no_retries(ask: Ask) -> None:
    service = Service(httpx.ConnectError("refused"))
    with pytest.raises(ConnectionLost, match="http://service: refused"):
        ask(service, patience_s=0)
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    "failing",
    [
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("closed"),
        httpx.Response(502, text="Bad Gateway"),
        httpx.Response(500, text="Internal Server Error"),  # Ray Serve, whose replica was lost
    ],
    ids=repr,
)
def test_a_request_that_may_have_been_executed_is_retried_with_its_key_and_never_as_a_stream(
    ask: Ask, pauses: Pauses, failing: Outcome
) -> None:
    service = Service(failing, good())
    ask(service)
    assert len({request.headers["idempotency-key"] for request in service.asked}) == 1
    assert len(pauses) == 1
    service = Service(failing)
    with pytest.raises((ConnectionLost, UnexpectedAnswer)):
        ask(service, on_event=print)
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    "failing",
    [*(refused(status, "1") for status in (400, 401, 404, 422, 500, 504)), httpx.ReadTimeout("")],
    ids=repr,
)
def test_a_request_that_would_fail_again_or_is_still_running_is_not_retried(
    ask: Ask, pauses: Pauses, failing: Outcome
) -> None:
    service = Service(failing)
    with pytest.raises((RequestFailed, ConnectionLost)):
        ask(service)
    assert (len(service.asked), pauses) == (1, [])


def tls_error(cause: ssl.SSLError) -> httpx.ConnectError:
    """Return the error of httpx for a connection that cannot be encrypted."""
    error = httpx.ConnectError(str(cause))
    error.__cause__ = OSError("of a layer between")
    error.__cause__.__context__ = cause
    return error


@pytest.mark.parametrize("streamed", [False, True])
def test_an_untrusted_certificate_is_not_retried(ask: Ask, pauses: Pauses, streamed: bool) -> None:
    cause = ssl.SSLCertVerificationError("certificate verify failed")
    cause.verify_code, cause.verify_message = 18, "self-signed certificate"
    service = Service(tls_error(cause))
    with pytest.raises(ConnectionLost, match=r"certificate is not trusted: self-signed certificate; set SSL_CERT_FILE"):
        ask(service, on_event=print if streamed else None)
    assert (len(service.asked), pauses) == (1, [])


def test_the_error_for_https_to_a_service_without_tls_has_the_remedy(ask: Ask, pauses: Pauses) -> None:
    cause = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)")
    cause.reason = "WRONG_VERSION_NUMBER"
    with pytest.raises(ConnectionLost, match=r"does not use TLS: write http://"):
        ask(Service(tls_error(cause)))
    assert pauses == []


def test_a_connection_that_broke_during_the_tls_handshake_is_retried(ask: Ask, pauses: Pauses) -> None:
    service = Service(tls_error(ssl.SSLEOFError("EOF occurred in violation of protocol")), good())
    assert ask(service).model == "m"
    assert len(pauses) == 1


def test_events_are_reported_in_order_and_the_answer_equals_that_of_a_plain_request(ask: Ask) -> None:
    events: list[Event] = []
    rest = QUEUED[9:] + b": keep-alive\n\n" + event("new-kind", x=1)
    body = Chunks(QUEUED[:9], rest, PROGRESS, event("completed", **ANSWER))
    service = Service(httpx.Response(200, stream=body))
    answer = ask(service, seed=4, on_event=events.append)
    assert answer == GenerateResponse.model_validate(ANSWER)
    assert [type(e).__name__ for e in events] == ["QueuedEvent", "ProgressEvent"]
    assert events[1] == ProgressEvent(position=0, step=3, steps=9, eta_s=1)
    assert json.loads(service.asked[0].content) == {"seed": 4, "stream": True}
    assert "idempotency-key" not in service.asked[0].headers
    assert body.closed


def test_the_error_of_a_failed_stream_has_the_reason(ask: Ask) -> None:
    failed = event("failed", type="urn:iddpm:x", title="Image failed", status=500, detail="image 1: overflowed")
    with pytest.raises(RequestFailed, match="Image failed: image 1: overflowed"):
        ask(Service(httpx.Response(200, content=QUEUED + failed)), on_event=lambda _: None)


@pytest.mark.parametrize(
    ("end", "said"),
    [((), "before the images"), ((httpx.ReadError("reset"),), "reset"), ((httpx.ReadTimeout(""),), "ReadTimeout")],
)
def test_a_stream_that_ends_early_is_an_error_and_is_not_retried(
    ask: Ask, end: tuple[Exception, ...], said: str
) -> None:
    body = Chunks(QUEUED, PROGRESS, *end)
    service = Service(httpx.Response(200, stream=body))
    with pytest.raises(ConnectionLost, match=said):
        ask(service, on_event=lambda _: None)
    assert (len(service.asked), body.closed) == (1, True)


@pytest.mark.parametrize("end", [httpx.ReadError("reset"), httpx.RemoteProtocolError("closed"), httpx.ReadTimeout("")])
def test_an_answer_that_has_arrived_is_returned_even_if_its_stream_breaks_off(ask: Ask, end: Exception) -> None:
    body = Chunks(PROGRESS, event("completed", **ANSWER), end)
    assert ask(Service(httpx.Response(200, stream=body)), on_event=lambda _: None).model == "m"
    assert body.closed


def test_an_error_in_on_event_ends_the_request(ask: Ask) -> None:
    body = Chunks(QUEUED, PROGRESS)

    def enough(_: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(Service(httpx.Response(200, stream=body)), on_event=enough)
    assert body.closed


def test_an_error_in_on_event_reaches_the_caller_even_if_it_comes_from_another_client(ask: Ask) -> None:
    def ask_elsewhere(_: Event) -> None:
        raise httpx.ReadTimeout("of another service")

    body = Chunks(QUEUED, PROGRESS)
    with pytest.raises(httpx.ReadTimeout, match="of another service"):
        ask(Service(httpx.Response(200, stream=body)), on_event=ask_elsewhere)
    assert body.closed


@pytest.mark.parametrize("key", ["", "a\nb", "clé", "x" * 256, "abc ", " abc", " "])
def test_an_invalid_idempotency_key_is_refused_before_it_is_sent(ask: Ask, key: str) -> None:
    service = Service(good())
    with pytest.raises(ValueError, match=r"^idempotency_key: must be 1 to 255 printable ASCII characters, .* end$"):
        ask(service, idempotency_key=key)
    assert not service.asked


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("field", "value"), [("eta", float("nan")), ("cfg_scale", float("inf")), ("seed", object()), ("class_", {1, 2})]
)
def test_a_field_that_json_cannot_hold_is_refused_before_it_is_sent(
    ask: Ask, field: str, value: object, streamed: bool
) -> None:
    service = Service(good())
    with pytest.raises(ValueError, match=f"^{field.strip('_')}: cannot be sent as JSON: "):
        ask(service, on_event=print if streamed else None, **{field: value})
    assert not service.asked


def test_a_stream_with_an_idempotency_key_is_refused_before_it_is_sent(ask: Ask) -> None:
    service = Service(good())
    with pytest.raises(ValueError, match="idempotency_key: cannot be used with on_event, a stream cannot be repeated"):
        ask(service, on_event=print, idempotency_key="mine")
    assert not service.asked


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(404, text="<html>nginx</html>"), "404 Not Found: <html>nginx</html>"),
        (httpx.Response(413, text="<html>\n  too\n large\n</html>"), "413 .*: <html> too large </html>$"),
        (
            httpx.Response(404, content=b"no \xff", headers={"Content-Type": "text/html; charset=idna"}),
            "404 Not Found: no",
        ),
        (httpx.Response(301, headers={"Location": "https://elsewhere"}), "301 Moved Permanently"),
        (httpx.Response(200, json={"images": 3}), "invalid GenerateResponse in the response"),
    ],
)
def test_answers_of_other_servers_are_recognised(ask: Ask, answer: httpx.Response, said: str) -> None:
    service = Service(answer)
    with pytest.raises(UnexpectedAnswer, match=said):
        ask(service, key="iddpm_secret")
    assert len(service.asked) == 1


def test_a_page_instead_of_events_is_recognised(ask: Ask) -> None:
    body = Chunks(b"<html>sign in</html>")
    service = Service(httpx.Response(200, stream=body, headers={"Content-Type": "text/html; charset=utf-8"}))
    with pytest.raises(UnexpectedAnswer, match=r"^200 with text/html; charset=utf-8 instead of text/event-stream$"):
        ask(service, on_event=print)
    assert body.closed


def test_an_error_of_a_socks_proxy_is_a_lost_connection(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    class MalformedReply(Exception):
        """A stand-in for the errors of an optional package."""

    monkeypatch.setattr(client_core, "CONNECTION_ERRORS", (httpx.RequestError, MalformedReply))
    with pytest.raises(ConnectionLost, match=r"^http://service: Malformed reply$"):
        ask(Service(MalformedReply("Malformed reply")))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_cannot_be_decompressed_is_an_error(ask: Ask, streamed: bool) -> None:
    body = Chunks(b"no gzip")
    service = Service(httpx.Response(200, stream=body, headers={"Content-Encoding": "gzip"}))
    with pytest.raises(UnexpectedAnswer, match=r"^http://service: the response cannot be decompressed: "):
        ask(service, on_event=print if streamed else None)
    assert body.closed


@pytest.mark.parametrize("key", ["iddpm_secret\n", "iddpm_sécret", "", "iddpm_secret ", " iddpm_secret"])
def test_an_invalid_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="key: must be printable ASCII characters") as raised:
        AsyncClient("http://service", key=key)
    assert "cret" not in str(raised.value)


def test_the_text_of_an_invalid_header_is_never_shown(ask: Ask) -> None:
    service = Service(httpx.LocalProtocolError("Illegal header value b'Bearer iddpm_secret '"))
    with pytest.raises(ConnectionLost, match=r"^http://service: the request is not valid HTTP$") as raised:
        ask(service)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_read_from_every_lossless_format(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, channels), dtype=np.uint8)
    for content in (encode(pixels), encode(pixels, "webp"), encode_npz(pixels[None], [3])):
        np.testing.assert_array_equal(pixels_of(base64.b64encode(content).decode())[..., :channels], pixels)


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_the_output_of_a_network_that_predicts_the_image_is_named() -> None:
    output = np.ones((1, 2, 2, 1))
    answer = httpx.Response(200, content=npz(x0=output, log_variance=-output), headers={"X-Numerics-Id": "n"})
    with Client("http://service", transport=httpx.MockTransport(Service(answer))) as client:
        found = client.denoise(x_t=output, timestep=3)
    assert (found.predicts, found.numerics_id) == ("x0", "n")
    assert found.prediction.dtype == np.float32
    assert (found.log_variance == -1).all()


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK", npz(eps=np.ones(1)), encode_npy(np.ones((1, 1, 1, 1)))])
def test_other_files_are_not_taken_for_the_network_s_output(content: bytes) -> None:
    service = Service(httpx.Response(200, content=content, headers={"X-Numerics-Id": "n"}))
    with (
        Client("http://service", transport=httpx.MockTransport(service)) as client,
        pytest.raises(UnexpectedAnswer, match="200 without an npz of the network's output"),
    ):
        client.denoise(x_t=b"", timestep=3)
