"""The part that the sync and the async client share: requests, responses and errors, without waiting.

ClientError
├── RequestFailed      the service refused the request or failed; holds its problem
├── ConnectionLost     there was no connection, or it ended before the response did
└── UnexpectedAnswer   the response does not come from this service
"""

from __future__ import annotations

import base64
import io
import json
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, TypeVar
from zipfile import BadZipFile

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ValidationError

from cli.connecting import CONNECTION_ERRORS, HEADER_VALUE
from cli.retries import Outcome, tls_error_of
from cli.server_sent_events import EventDecoder
from formats.given_shapes import Fit
from service.http.native.event_schemas import PreviewEvent, ProgressEvent, QueuedEvent
from service.http.native.schemas import GenerateResponse, ModelList, Problem
from service.requests.generate_request import ImageFormat, PriorityName, ValueType

CONNECT_S = 10.0
ANSWER_S = 3660.0
"""Read timeout of a response: a little more than the service's default time limit (IDDPM_MAX_REQUEST_S)."""
STREAM_SILENCE_S = 60.0
"""Read timeout of a stream; the service sends something at least every 15 seconds."""
SHOWN = 200
NPY_MAGIC = b"\x93NUMPY"
EVENTS = "text/event-stream"
LONGEST_IDEMPOTENCY_KEY = 255
UNKNOWN_AUTHORITY = frozenset({18, 19, 20, 21})
"""OpenSSL's X509_V_ERR_... codes for certificates, or authorities, that are self-signed or of an unknown issuer."""

NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST"})
"""OpenSSL's reasons if the other end uses plain HTTP."""

Event = QueuedEvent | ProgressEvent | PreviewEvent
M = TypeVar("M", bound=BaseModel)
_EVENTS: dict[str, type[Event]] = {"queued": QueuedEvent, "progress": ProgressEvent, "preview": PreviewEvent}


class ClientError(Exception):
    """A request has no valid response."""


class RequestFailed(ClientError):
    """The service refused the request or failed; a retry was not safe, not useful, or not possible in time."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem


class ConnectionLost(ClientError):
    """There was no connection, or it ended before the response did."""


class StreamEnded(ConnectionLost):
    """The events of a request ended before its response."""


class UnexpectedAnswer(ClientError):
    """The response does not come from this service."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, if it is not that of a success."""


GivenFile = str | bytes | npt.NDArray[Any]
"""A given image: the bytes of a file, an array [H, W, C] or [n, H, W, C], or a file in base64."""


class Upsample(TypedDict, total=False):
    """How the upsampler of a cascade samples."""

    steps: int
    sampler: str
    cfg_scale: float
    classifier_scale: float


class Resample(TypedDict):
    """RePaint's resampling of a masked image."""

    times: int
    jump: int


class GenerateFields(TypedDict, total=False):
    """Fields of `POST /v1/generate` as keyword arguments; the README describes them."""

    model: str
    class_: int | str | Sequence[int | str]
    n: int
    steps: int
    respacing: str
    sampler: str
    eta: float
    cfg_scale: float
    classifier_scale: float
    seed: int
    image_index: int
    image: GivenFile
    mask: GivenFile
    latent: GivenFile
    cond: GivenFile
    strength: float
    start_timestep: int
    resample: Resample
    upsample: Upsample
    fit: Fit
    clip: bool
    format: ImageFormat
    dtype: ValueType
    quality: int
    compression: int
    preview_every: int
    priority: PriorityName
    deadline_s: float


class EncodeFields(TypedDict, total=False):
    """Fields of `POST /v1/encode` as keyword arguments; docs/http.md describes them."""

    model: str
    image: Required[GivenFile]
    fit: Fit
    class_: int | str | Sequence[int | str]
    cond: GivenFile
    cfg_scale: float
    steps: int
    end_timestep: int
    clip: bool
    priority: PriorityName
    deadline_s: float


class DenoiseFields(TypedDict, total=False):
    """Fields of `POST /v1/denoise` as keyword arguments; docs/http.md describes them."""

    model: str
    x_t: Required[GivenFile]
    timestep: Required[int | Sequence[int]]
    class_: int | str | Sequence[int | str]
    cond: GivenFile
    fit: Fit
    cfg_scale: float
    priority: PriorityName
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Latents of images."""

    latents: npt.NDArray[np.float32]
    """float32 [n, H, W, C], in the units of the network; `latent` of `generate` takes them."""
    timestep: int
    """t of the training chain where they are, for `start_timestep`."""
    numerics_id: str


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """The output of single calls of the network, float32 [n, H, W, C], in the units of the network."""

    predicts: Literal["eps", "x0"]
    """What the model's network predicts."""
    prediction: npt.NDArray[np.float32]
    log_variance: npt.NDArray[np.float32]
    """Of p(x_{t-1} | x_t) in the chain of all timesteps."""
    numerics_id: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request, which may be sent several times."""

    method: str
    path: str
    content: bytes | None = None
    headers: dict[str, str]
    silence_s: float
    """Read timeout in seconds."""
    streamed: bool = False
    """Whether the response is read incrementally."""
    repeatable: bool
    """Whether a repetition has the same result, and the service does the work once."""

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Build the request for a connection."""
        timeout = httpx.Timeout(self.silence_s, connect=CONNECT_S, pool=None)
        return http.build_request(self.method, self.path, content=self.content, headers=self.headers, timeout=timeout)


def models_call() -> Call:
    """Return the call that lists the models."""
    return Call(method="GET", path="v1/models", headers={}, silence_s=STREAM_SILENCE_S, repeatable=True)


def generate_call(fields: GenerateFields, idempotency_key: str | None) -> Call:
    """Return the call that generates images in one response. The key, random if None, makes retries safe.

    Raises:
        ValueError: the key is invalid, or JSON cannot hold a field.
    """
    if idempotency_key is None:
        idempotency_key = uuid.uuid4().hex
    if len(idempotency_key) > LONGEST_IDEMPOTENCY_KEY or not HEADER_VALUE.fullmatch(idempotency_key):
        raise ValueError(
            f"idempotency_key: must be 1 to {LONGEST_IDEMPOTENCY_KEY} printable ASCII characters, "
            "without blanks at the beginning or end"
        )
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
    """Return the call that generates images with a stream of events.

    Raises:
        ValueError: a key is given, although a stream cannot be repeated; or JSON cannot hold a field.
    """
    if idempotency_key is not None:
        raise ValueError(
            "idempotency_key: cannot be used with on_event, a stream cannot be repeated; give a seed instead"
        )
    return Call(
        method="POST",
        path="v1/generate",
        content=_body(fields, stream=True),
        headers={"Content-Type": "application/json"},
        silence_s=STREAM_SILENCE_S,
        streamed=True,
        repeatable=False,
    )


def encode_call(fields: EncodeFields) -> Call:
    """Return the call that encodes images.

    Raises:
        ValueError: JSON cannot hold a field.
    """
    return _arrays_call("v1/encode", {**fields, "format": "npy"})


def denoise_call(fields: DenoiseFields) -> Call:
    """Return the call that runs the network once per array.

    Raises:
        ValueError: JSON cannot hold a field.
    """
    return _arrays_call("v1/denoise", fields)


def _arrays_call(path: str, fields: Mapping[str, object]) -> Call:
    return Call(
        method="POST",
        path=path,
        content=json.dumps(_named(fields)).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex},
        silence_s=ANSWER_S,
        repeatable=True,
    )


class Following:
    """Read a stream: pass its events to a function, and keep the final response."""

    def __init__(self, on_event: Callable[[Event], object]) -> None:
        self._on_event = on_event
        self._decoder = EventDecoder()
        self._answer: GenerateResponse | None = None

    def feed(self, chunk: bytes) -> None:
        """Process bytes of the stream; unknown kinds of events are ignored.

        Raises:
            RequestFailed: the last event reports that an image or the engine failed.
            UnexpectedAnswer: the data of an event is invalid.
        """
        for event in self._decoder.feed(chunk):
            if event.name == "completed":
                self._answer = _read(GenerateResponse, event.data)
            elif event.name == "failed":
                raise RequestFailed(_read(Problem, event.data))
            elif event.name in _EVENTS:
                self._on_event(_read(_EVENTS[event.name], event.data))

    @property
    def answered(self) -> bool:
        """Whether the final response has arrived; what follows it is only the end of the stream."""
        return self._answer is not None

    def answer(self) -> GenerateResponse:
        """Return the final response.

        Raises:
            StreamEnded: the stream ended before it.
        """
        if self._answer is None:
            raise StreamEnded("the stream ended before the images were done")
        return self._answer


def read_models(response: httpx.Response) -> ModelList:
    """Parse the response to `models_call`; raise UnexpectedAnswer if it is invalid."""
    return _read(ModelList, response.content)


def read_generated(response: httpx.Response) -> GenerateResponse:
    """Parse the response to `generate_call`; raise UnexpectedAnswer if it is invalid."""
    return _read(GenerateResponse, response.content)


def read_encoded(response: httpx.Response) -> Encoded:
    """Parse the response to `encode_call`; raise UnexpectedAnswer if it is invalid."""
    try:
        latents = np.lib.format.read_array(io.BytesIO(response.content), allow_pickle=False)
        return Encoded(
            latents=latents.astype(np.float32, copy=False),
            timestep=int(response.headers["X-Timestep"]),
            numerics_id=response.headers["X-Numerics-Id"],
        )
    except (ValueError, KeyError) as error:
        raise UnexpectedAnswer(f"{response.status_code} without an npy file and its timestep") from error


def read_denoised(response: httpx.Response) -> Denoised:
    """Parse the response to `denoise_call`; raise UnexpectedAnswer if it is invalid."""
    try:
        with np.load(io.BytesIO(response.content), allow_pickle=False) as arrays:
            predicts: Literal["eps", "x0"] = "eps" if "eps" in arrays else "x0"
            return Denoised(
                predicts=predicts,
                prediction=arrays[predicts].astype(np.float32, copy=False),
                log_variance=arrays["log_variance"].astype(np.float32, copy=False),
                numerics_id=response.headers["X-Numerics-Id"],
            )
    except (ValueError, KeyError, EOFError, TypeError, BadZipFile) as error:
        raise UnexpectedAnswer(f"{response.status_code} without an npz of the network's output") from error


def refuse_other_streams(response: httpx.Response) -> None:
    """Check the content type of a successful response to a stream call, if it has one.

    Raises:
        UnexpectedAnswer: it is not an event stream but, for example, a proxy's page.
    """
    declared = response.headers.get("content-type", EVENTS)
    if declared.partition(";")[0].strip().lower() != EVENTS:
        raise UnexpectedAnswer(f"{response.status_code} with {declared[:SHOWN]} instead of {EVENTS}")


def failure_of(outcome: Outcome) -> Exception:
    """Return the exception for an unsuccessful outcome; a proxy's response may hold no problem."""
    if isinstance(outcome, httpx.TransportError):
        return outcome
    try:
        return RequestFailed(Problem.model_validate_json(outcome.content))
    except ValidationError:
        text = " ".join(outcome.content.decode(errors="replace").split())[:SHOWN]
        reason = f"{outcome.status_code} {outcome.reason_phrase}: {text}".rstrip(": ")
        return UnexpectedAnswer(reason, outcome.status_code)


@contextmanager
def as_client_errors(name: str) -> Iterator[None]:
    """Convert httpx's exceptions to errors of the client.

    Args:
        name: name of the service in messages.

    Raises:
        ConnectionLost: there was no connection, or it broke.
        UnexpectedAnswer: the response cannot be decompressed.
    """
    try:
        yield
    except httpx.DecodingError as error:
        raise UnexpectedAnswer(f"{name}: the response cannot be decompressed: {error}") from error
    except httpx.LocalProtocolError:  # its text, also in a traceback, may hold a header with the key
        raise ConnectionLost(f"{name}: the request is not valid HTTP") from None
    except CONNECTION_ERRORS as error:
        raise ConnectionLost(f"{name}: {_described(error)}") from error


def _described(error: Exception) -> str:
    cause = tls_error_of(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        cure = "; set SSL_CERT_FILE to the authority's certificate" if cause.verify_code in UNKNOWN_AUTHORITY else ""
        return f"its certificate is not trusted: {cause.verify_message}{cure}"
    if cause is not None and cause.reason in NOT_TLS:
        return "it does not use TLS: write http:// if the service has no certificate"
    return str(error) or type(error).__name__


def pixels_of(image_b64: str) -> npt.NDArray[Any]:
    """Decode the `b64_json` of an image or a preview, in any format.

    Returns:
        Pixels, uint8 [H, W, C]; with `dtype="float32"`, values in the units of the data, float32 [H, W, C].
    """
    content = base64.b64decode(image_b64)
    if content.startswith((b"PK", NPY_MAGIC)):  # an npz is a zip
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        array: npt.NDArray[Any] = loaded if isinstance(loaded, np.ndarray) else loaded["arr_0"]
        return array.reshape(array.shape[-3:])  # an npz has an axis for several images
    with Image.open(io.BytesIO(content)) as picture:
        flat = np.asarray(picture)
    return flat.reshape(*flat.shape[:2], -1)  # a grey picture is [H, W]


def arrays_of(answer: GenerateResponse) -> npt.NDArray[Any]:
    """Decode all images of a response to one array [n, H, W, C]; see `pixels_of` for its type and units."""
    return np.stack([pixels_of(image.b64_json) for image in answer.images])


def _body(fields: GenerateFields, *, stream: bool) -> bytes:
    return json.dumps({**_named(fields), "stream": stream}).encode()


def _named(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields as JSON has them; raise ValueError if it cannot."""
    named = {"class" if name == "class_" else name: _sendable(value) for name, value in fields.items()}
    for name, value in named.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}: cannot be sent as JSON: {error}") from error
    return named


def _sendable(value: object) -> object:
    """Return a given image as base64, and any other value unchanged."""
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        value = file.getvalue()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _read(kind: type[M], text: str | bytes) -> M:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise UnexpectedAnswer(
            f"invalid {kind.__name__} in the response: {error.error_count()} fields are wrong"
        ) from error
