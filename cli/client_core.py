"""What the sync and the async client share: everything but waiting. What is sent, what it comes to, what can go wrong.

ClientError
├── RequestFailed      the service said no, or could not: holds its problem
├── ConnectionLost     there was no connection, or it ended before the answer did
└── UnexpectedAnswer   what answers there is not this service
"""

from __future__ import annotations

import base64
import io
import json
import re
import ssl
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ValidationError

from cli.connecting import CONNECTION_ERRORS
from cli.retries import Outcome, tls_error_of
from cli.server_sent_events import EventDecoder
from diffusion.plans import Sampler
from service.http.native.event_schemas import PreviewEvent, ProgressEvent, QueuedEvent
from service.http.native.schemas import GenerateResponse, ModelList, Problem
from service.requests.generate_request import ImageFormat, PriorityName

CONNECT_S = 10.0
ANSWER_S = 3660.0
"""Longest silence before an answer: a little more than a service takes by default (IDDPM_MAX_REQUEST_S)."""
STREAM_SILENCE_S = 60.0
"""A stream says something every 15 seconds."""
SHOWN = 200
EVENTS = "text/event-stream"
IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
UNKNOWN_AUTHORITY = frozenset({18, 19, 20, 21})
"""X509_V_ERR_... of OpenSSL: the certificate, or its authority's, is signed by itself or by nobody that is known."""

NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST"})
"""OpenSSL's reasons where the other end answers in plain HTTP."""

Event = QueuedEvent | ProgressEvent | PreviewEvent
M = TypeVar("M", bound=BaseModel)
_EVENTS: dict[str, type[Event]] = {"queued": QueuedEvent, "progress": ProgressEvent, "preview": PreviewEvent}


class ClientError(Exception):
    """A request did not come to its answer."""


class RequestFailed(ClientError):
    """The service said no, or could not; sending it again was not safe, not useful, or took too long."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem


class ConnectionLost(ClientError):
    """There was no connection, or it ended before the answer did."""


class UnexpectedAnswer(ClientError):
    """What answers there is not this service."""


class GenerateFields(TypedDict, total=False):
    """Fields of `POST /v1/generate`, as keyword arguments; the README says what they mean."""

    model: str
    class_: int | str | Sequence[int | str]
    n: int
    steps: int
    respacing: str
    sampler: Sampler
    eta: float
    cfg_scale: float
    classifier_scale: float
    seed: int
    image_index: int
    format: ImageFormat
    quality: int
    compression: int
    preview_every: int
    priority: PriorityName
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request that may be sent, several times perhaps."""

    method: str
    path: str
    content: bytes | None = None
    headers: dict[str, str]
    silence_s: float
    """Longest time without a byte of the answer."""
    streamed: bool = False
    """Whether the answer is read as it comes."""
    repeatable: bool
    """Whether sending it again gives what the first time gave, or would have given."""

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Build what a connection sends."""
        timeout = httpx.Timeout(self.silence_s, connect=CONNECT_S, pool=None)
        return http.build_request(self.method, self.path, content=self.content, headers=self.headers, timeout=timeout)


def models_call() -> Call:
    """Ask which models there are."""
    return Call(method="GET", path="v1/models", headers={}, silence_s=STREAM_SILENCE_S, repeatable=True)


def generate_call(fields: GenerateFields, idempotency_key: str | None) -> Call:
    """Ask for images in one answer. The key, which is drawn if none is given, makes it safe to send again.

    Raises:
        ValueError: a key that cannot be one, or a field that JSON cannot hold.
    """
    if idempotency_key is None:
        idempotency_key = uuid.uuid4().hex
    if not IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise ValueError(f"idempotency_key: must be 1 to 255 printable ASCII characters; got {idempotency_key!r}")
    headers = {
        "Accept": "application/json",
        "Content-Type": "application/json",
        "Idempotency-Key": idempotency_key,
    }
    content = _body(fields, stream=False)
    return Call(
        method="POST", path="v1/generate", content=content, headers=headers, silence_s=ANSWER_S, repeatable=True
    )


def stream_call(fields: GenerateFields, idempotency_key: str | None) -> Call:
    """Ask for images and to be told how they come about.

    Raises:
        ValueError: with a key, since a stream cannot be answered twice; or a field that JSON cannot hold.
    """
    if idempotency_key is not None:
        raise ValueError("idempotency_key: a stream cannot be answered twice; leave it or on_event out, or give a seed")
    return Call(
        method="POST",
        path="v1/generate",
        content=_body(fields, stream=True),
        headers={"Content-Type": "application/json"},
        silence_s=STREAM_SILENCE_S,
        streamed=True,
        repeatable=False,
    )


class Following:
    """Reads a stream: tells its events, and holds the answer in the end."""

    def __init__(self, on_event: Callable[[Event], object]) -> None:
        self._on_event = on_event
        self._decoder = EventDecoder()
        self._answer: GenerateResponse | None = None

    def feed(self, chunk: bytes) -> None:
        """Take bytes of the stream; kinds of events that are not known are passed over.

        Raises:
            RequestFailed: the last event says that an image or the engine failed.
            UnexpectedAnswer: an event that does not hold what it must.
        """
        for event in self._decoder.feed(chunk):
            if event.name == "completed":
                self._answer = _read(GenerateResponse, event.data)
            elif event.name == "failed":
                raise RequestFailed(_read(Problem, event.data))
            elif event.name in _EVENTS:
                self._on_event(_read(_EVENTS[event.name], event.data))

    def answer(self) -> GenerateResponse:
        """Return what the stream came to.

        Raises:
            ConnectionLost: it ended before that.
        """
        if self._answer is None:
            raise ConnectionLost("the stream ended before the images were done")
        return self._answer


def read_models(response: httpx.Response) -> ModelList:
    """Read the answer to `models_call`."""
    return _read(ModelList, response.content)


def read_generated(response: httpx.Response) -> GenerateResponse:
    """Read the answer to `generate_call`."""
    return _read(GenerateResponse, response.content)


def refuse_other_streams(response: httpx.Response) -> None:
    """Check that a good answer is declared as events, where it is declared at all.

    Raises:
        UnexpectedAnswer: it is a page of a proxy, for example.
    """
    declared = response.headers.get("content-type", EVENTS)
    if declared.partition(";")[0].strip().lower() != EVENTS:
        raise UnexpectedAnswer(f"{response.status_code} with {declared[:SHOWN]} instead of {EVENTS}")


def failure_of(outcome: Outcome) -> Exception:
    """Return the error to raise for what is no good answer; a proxy's may hold no problem."""
    if isinstance(outcome, httpx.TransportError):
        return outcome
    try:
        return RequestFailed(Problem.model_validate_json(outcome.content))
    except ValidationError:
        said = " ".join(outcome.content.decode(errors="replace").split())[:SHOWN]
        return UnexpectedAnswer(f"{outcome.status_code} {outcome.reason_phrase}: {said}".rstrip(": "))


@contextmanager
def as_client_errors(name: str) -> Iterator[None]:
    """Turn what httpx raises while it sends and reads into errors of the client.

    Args:
        name: what errors call the other end.
    """
    try:
        yield
    except httpx.DecodingError as error:
        raise UnexpectedAnswer(f"{name}: the answer cannot be unpacked: {error}") from error
    except CONNECTION_ERRORS as error:
        raise ConnectionLost(f"{name}: {_described(error)}") from error


def _described(error: Exception) -> str:
    cause = tls_error_of(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        cure = "; SSL_CERT_FILE may name a file with the authority's" if cause.verify_code in UNKNOWN_AUTHORITY else ""
        return f"its certificate is not trusted: {cause.verify_message}{cure}"
    if cause is not None and cause.reason in NOT_TLS:
        return "it does not answer with TLS: write http:// if it serves without"
    return str(error) or type(error).__name__


def pixels_of(image_b64: str) -> npt.NDArray[np.uint8]:
    """Decode `b64_json` of an image or a preview, in any format.

    Returns:
        uint8 [H, W, C].
    """
    content = base64.b64decode(image_b64)
    if content.startswith(b"PK"):  # an npz is a zip
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            pixels: npt.NDArray[np.uint8] = arrays["arr_0"][0]
            return pixels
    with Image.open(io.BytesIO(content)) as picture:
        flat = np.asarray(picture)
    return flat.reshape(*flat.shape[:2], -1)  # of a grey picture [H, W]


def _body(fields: GenerateFields, *, stream: bool) -> bytes:
    named = {"class" if name == "class_" else name: value for name, value in fields.items()}
    for name, value in named.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}: cannot be sent as JSON: {error}") from error
    return json.dumps({**named, "stream": stream}).encode()


def _read(kind: type[M], text: str | bytes) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise UnexpectedAnswer(f"what came is no {kind.__name__}: {error.error_count()} fields are wrong") from error
